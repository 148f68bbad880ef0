"""What the bucket has, held against what is referenced: missing, altered, unreferenced."""

import asyncio
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from esper.errors import AlteredBlobError, MissingBlobError
from esper.storage.blob_keys import BlobKind, StoredBlob
from esper.storage.blobs import BlobStore

MAX_PARALLEL_READS = 10

Name = tuple[BlobKind, str]
"""Kind and digest of a blob."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A blob with which something is wrong, and who references it."""

    kind: BlobKind
    digest: str
    problem: str
    referenced_by: tuple[str, ...]


@dataclass(slots=True)
class Inspection:
    """What an inspection found. ``unreferenced`` are no fault: an upload may not be registered yet."""

    num_referenced: int = 0
    num_read: int = 0
    num_bytes: int = 0
    missing: list[Finding] = field(default_factory=list)
    altered: list[Finding] = field(default_factory=list)
    elsewhere: list[Name] = field(default_factory=list)
    unreferenced: list[StoredBlob] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether everything that is referenced is there, as its name says."""
        return not self.missing and not self.altered


async def stored_blobs(blobs: BlobStore) -> dict[Name, StoredBlob]:
    """Everything that the bucket has."""
    return {(kind, b.digest): b for kind in BlobKind async for b in blobs.blobs(kind)}


async def inspect(
    blobs: BlobStore,
    references: Mapping[Name, Collection[str]],
    *,
    share: float = 1.0,
    rng: random.Random | None = None,
    progress: Callable[[int, int], None] = lambda _done, _todo: None,
) -> Inspection:
    """See that every referenced blob is there, and read a share of them through.

    A checkpoint that the bucket never had is not missing: trainers keep theirs on disk.

    Args:
        references: the blobs that are referenced, and by what.
        share: 0..1, of those that are there; chosen by ``rng``.

    Raises:
        NotAllowedError, UnavailableError: S3 does not let itself be read.
    """
    stored = await stored_blobs(blobs)
    found = Inspection(num_referenced=len(references))
    found.unreferenced = [blob for name, blob in stored.items() if name not in references]
    for name in references:
        if name not in stored:
            if name[0] is BlobKind.CHECKPOINT:
                found.elsewhere.append(name)
            else:
                found.missing.append(_finding(name, references, "the bucket does not have it"))
    there = sorted(name for name in references if name in stored)
    if share < 1.0:
        there = (rng or random.Random()).sample(there, round(share * len(there)))
    await _read_through(blobs, there, references, found, progress)
    found.missing.sort(key=lambda f: (f.kind, f.digest))
    found.altered.sort(key=lambda f: (f.kind, f.digest))
    return found


async def _read_through(
    blobs: BlobStore,
    names: list[Name],
    references: Mapping[Name, Collection[str]],
    found: Inspection,
    progress: Callable[[int, int], None],
) -> None:
    todo, num = list(reversed(names)), len(names)

    async def keep_reading() -> None:
        while todo:
            name = todo.pop()
            kind, digest = name
            try:
                found.num_bytes += await blobs.check(digest, kind=kind)
            except MissingBlobError:
                found.missing.append(_finding(name, references, "it went while the bucket was read"))
            except AlteredBlobError as error:
                found.altered.append(_finding(name, references, str(error)))
            found.num_read += 1
            progress(found.num_read, num)

    progress(0, num)
    readers = [asyncio.create_task(keep_reading()) for _n in range(MAX_PARALLEL_READS)]
    try:
        await asyncio.gather(*readers)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _finding(name: Name, references: Mapping[Name, Collection[str]], problem: str) -> Finding:
    return Finding(*name, problem, tuple(sorted(references[name])))


def collectable(
    stored: Mapping[Name, StoredBlob], referenced: Collection[str], older_than: datetime
) -> list[StoredBlob]:
    """The blobs that may go: no digest in ``referenced``, whatever its kind, and not written since ``older_than``."""
    return [b for b in stored.values() if b.digest not in referenced and b.modified_at < older_than]
