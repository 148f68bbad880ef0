"""Compares the bucket with the references to its blobs: finds missing, altered and unreferenced blobs."""

import asyncio
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from esper.errors import AlteredBlobError, MissingBlobError
from esper.storage.blob_keys import BlobKind, StoredBlob
from esper.storage.blobs import BlobStore

MAX_PARALLEL_READS = 10

BlobName = tuple[BlobKind, str]
"""Kind and digest of a blob."""

References = Mapping[BlobName, Collection[str]]
"""Blob -> what references it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A referenced blob with a problem."""

    kind: BlobKind
    digest: str
    problem: str
    referenced_by: tuple[str, ...]


@dataclass(slots=True)
class Inspection:
    """The result of an inspection. ``num_read`` and ``num_bytes`` count the blobs that were read and verified."""

    num_referenced: int = 0
    num_read: int = 0
    num_bytes: int = 0
    missing: list[Finding] = field(default_factory=list)
    altered: list[Finding] = field(default_factory=list)
    local_only: list[BlobName] = field(default_factory=list)  # checkpoints on the disks of their trainers: no fault
    unreferenced: list[StoredBlob] = field(default_factory=list)  # no fault: an upload may not be registered yet

    @property
    def is_whole(self) -> bool:
        """Whether every referenced blob is in the bucket and unaltered, as far as it was read."""
        return not self.missing and not self.altered


async def stored_blobs(blobs: BlobStore) -> dict[BlobName, StoredBlob]:
    """Every blob in the bucket."""
    return {(kind, b.digest): b for kind in BlobKind async for b in blobs.blobs(kind)}


async def inspect(
    blobs: BlobStore,
    references: References,
    *,
    share: float = 1.0,
    rng: random.Random | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Check that every referenced blob is in the bucket, and read and verify a share of them.

    A checkpoint that is not in the bucket is not missing: trainers keep theirs on disk.

    Args:
        share: the fraction of blobs to read, from 0 to 1, chosen by ``rng``.
        progress: called with the numbers of blobs read and to be read.

    Raises:
        NotAllowedError, UnavailableError: S3 refuses these credentials, or does not answer.
    """
    stored = await stored_blobs(blobs)
    found = Inspection(num_referenced=len(references))
    found.unreferenced = [blob for name, blob in stored.items() if name not in references]
    for name in references:
        if name not in stored:
            if name[0] is BlobKind.CHECKPOINT:
                found.local_only.append(name)
            else:
                found.missing.append(_finding(name, references, "the bucket does not have it"))
    readable = sorted(name for name in references if name in stored)
    if share < 1.0:
        readable = (rng or random.Random()).sample(readable, round(share * len(readable)))
    await _read_all(blobs, readable, references, found, progress)
    found.missing.sort(key=lambda f: (f.kind, f.digest))
    found.altered.sort(key=lambda f: (f.kind, f.digest))
    return found


async def _read_all(
    blobs: BlobStore,
    names: list[BlobName],
    references: References,
    found: Inspection,
    progress: Callable[[int, int], None],
) -> None:
    remaining, total = list(reversed(names)), len(names)

    async def keep_reading() -> None:
        while remaining:
            name = remaining.pop()
            kind, digest = name
            try:
                found.num_bytes += await blobs.check(digest, kind=kind)
            except MissingBlobError:
                found.missing.append(_finding(name, references, "it was deleted during the inspection"))
            except AlteredBlobError as error:
                found.altered.append(_finding(name, references, str(error)))
            found.num_read += 1
            progress(found.num_read, total)

    progress(0, total)
    readers = [asyncio.create_task(keep_reading()) for _n in range(MAX_PARALLEL_READS)]
    try:
        await asyncio.gather(*readers)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _finding(name: BlobName, references: References, problem: str) -> Finding:
    return Finding(*name, problem, tuple(sorted(references[name])))


def collectable(
    stored: Mapping[BlobName, StoredBlob], referenced: Collection[str], older_than: datetime
) -> list[StoredBlob]:
    """The blobs to delete: not written since ``older_than``, and no digest in ``referenced``, whatever the kind."""
    return [b for b in stored.values() if b.digest not in referenced and b.modified_at < older_than]
