"""Keys of blobs in the bucket: ``<kind>/<SHA-256 of the bytes in hexadecimal>``."""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

SHA256 = re.compile(r"[0-9a-f]{64}")
NUM_SHOWN_DIGITS = 12  # digits of a hash in messages


class BlobKind(StrEnum):
    """The kind of a blob; also its prefix in the bucket."""

    KERNEL = "kernels"
    CHECKPOINT = "checkpoints"
    POLICY = "policies"


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob in the bucket. ``modified_at`` is by S3's clock."""

    kind: BlobKind
    digest: str
    size_bytes: int
    modified_at: datetime


def key_of(kind: BlobKind, digest: str) -> str:
    """The key of a blob.

    Raises:
        ValueError: ``digest`` is not a SHA-256 in hexadecimal.
    """
    if not SHA256.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a SHA-256 in hexadecimal")
    return f"{kind}/{digest}"


def parse_key(key: str) -> tuple[BlobKind, str] | None:
    """The inverse of ``key_of``; None for a key that is not a blob's."""
    prefix, _, digest = key.partition("/")
    if prefix in set(BlobKind) and SHA256.fullmatch(digest):
        return BlobKind(prefix), digest
    return None
