"""Where blobs are in the bucket: ``<kind>/<SHA-256 of the bytes>``, in hexadecimal."""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

SHA256 = re.compile(r"[0-9a-f]{64}")
SHORT = 12  # digits of a hash that messages show


class BlobKind(StrEnum):
    """What a blob is; also its folder in the bucket."""

    KERNEL = "kernels"
    CHECKPOINT = "checkpoints"
    POLICY = "policies"


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob that the bucket has. ``modified_at`` is S3's own time."""

    kind: BlobKind
    digest: str
    size_bytes: int
    modified_at: datetime


def key_of(kind: BlobKind, digest: str) -> str:
    """The key of a blob.

    Raises:
        ValueError: ``digest`` is no SHA-256.
    """
    if not SHA256.fullmatch(digest):
        raise ValueError(f"{digest!r} is no SHA-256 in hexadecimal")
    return f"{kind}/{digest}"


def parse_key(key: str) -> tuple[BlobKind, str] | None:
    """The inverse of ``key_of``; None for a key that is no blob's."""
    folder, _, digest = key.partition("/")
    if folder in set(BlobKind) and SHA256.fullmatch(digest):
        return BlobKind(folder), digest
    return None
