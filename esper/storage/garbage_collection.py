"""Deletes blobs that nothing references, each under a mark that those who store see (see ``marks``).

Does not know what is referenced: it is told what is doomed. Invariant: a blob that was written
after ``older_than`` is not deleted, however late that write came.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from esper.errors import UnavailableError
from esper.storage.blob_keys import StoredBlob, key_of
from esper.storage.blobs import BlobStore
from esper.storage.s3_client import Operation
from esper.storage.tombstones import DELETE_S, mark, standing, unmark

MAX_PARALLEL = 10


@dataclass(slots=True)
class Collected:
    """What became of the doomed. ``unsure``: S3 did not say whether it deleted them; the next collector sees."""

    deleted: list[StoredBlob] = field(default_factory=list)
    revived: list[StoredBlob] = field(default_factory=list)
    gone: list[StoredBlob] = field(default_factory=list)
    unsure: list[StoredBlob] = field(default_factory=list)


async def collect(
    blobs: BlobStore,
    doomed: Sequence[StoredBlob],
    older_than: datetime,
    progress: Callable[[], None] = lambda: None,
) -> Collected:
    """Delete the doomed that nobody wrote since ``older_than`` (by S3's clock).

    Raises:
        NotAllowedError: S3 refuses it.
    """
    done, todo = Collected(), list(reversed(doomed))

    async def keep_deleting() -> None:
        while todo:
            blob = todo.pop()
            try:
                async with blobs.client.operation("delete", DELETE_S) as operation:
                    fate = await _delete(operation, blob, older_than, done)
            except UnavailableError:
                fate = done.unsure
            fate.append(blob)
            progress()

    # no TaskGroup: a delete that is cancelled half-way may still arrive, so the others are not
    results = await asyncio.gather(*(keep_deleting() for _n in range(MAX_PARALLEL)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return done


async def _delete(operation: Operation, blob: StoredBlob, older_than: datetime, done: Collected) -> list[StoredBlob]:
    """Mark, look, delete, unmark; the list that the blob belongs in. The mark stays while a delete may be under way."""
    key = key_of(blob.kind, blob.digest)
    await mark(operation, key)
    found = await standing(operation, key)
    if found.modified_at is None or found.modified_at >= older_than:
        await unmark(operation, key)
        return done.gone if found.modified_at is None else done.revived
    answer = await operation.once("delete_object", key)
    if not answer["ResponseMetadata"].get("RetryAttempts"):
        await unmark(operation, key)
    return done.deleted
