"""Deletes unreferenced blobs, each under a tombstone that concurrent writers see (``esper.storage.tombstones``).

``esper.streams.blob_collection`` decides which blobs are unreferenced. Invariant: a blob that was written after
``older_than`` is not deleted, however late that write arrives.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from esper.errors import UnavailableError
from esper.storage.blob_keys import StoredBlob, key_of
from esper.storage.blobs import BlobStore
from esper.storage.s3_client import Operation
from esper.storage.tombstones import DELETE_TIMEOUT_S, blob_state, remove_tombstone, write_tombstone

MAX_PARALLEL_DELETES = 10


@dataclass(slots=True)
class Collected:
    """The result of a collection."""

    deleted: list[StoredBlob] = field(default_factory=list)
    revived: list[StoredBlob] = field(default_factory=list)  # kept, because they were written again
    missing: list[StoredBlob] = field(default_factory=list)  # another collector has deleted them
    unconfirmed: list[StoredBlob] = field(default_factory=list)  # S3 confirmed no delete; the next collection retries


async def collect(
    blobs: BlobStore,
    garbage: Sequence[StoredBlob],
    older_than: datetime,
    progress: Callable[[], None] = lambda: None,
) -> Collected:
    """Delete blobs that were not written since ``older_than`` (by S3's clock).

    Args:
        garbage: blobs that nothing references.
        progress: called after each blob.

    Raises:
        NotAllowedError: S3 refuses these credentials.
    """
    collected, remaining = Collected(), list(reversed(garbage))

    async def keep_deleting() -> None:
        while remaining:
            blob = remaining.pop()
            try:
                async with blobs.client.operation("delete", DELETE_TIMEOUT_S) as operation:
                    result = await _delete(operation, blob, older_than, collected)
            except UnavailableError:
                result = collected.unconfirmed
            result.append(blob)
            progress()

    # no TaskGroup: it would cancel the other deletes, and a cancelled request may still arrive
    results = await asyncio.gather(*(keep_deleting() for _n in range(MAX_PARALLEL_DELETES)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return collected


async def _delete(
    operation: Operation, blob: StoredBlob, older_than: datetime, collected: Collected
) -> list[StoredBlob]:
    """Write the tombstone, check the blob's age, delete it, remove the tombstone; returns the blob's result list.

    The tombstone stays while a delete may be in flight.
    """
    key = key_of(blob.kind, blob.digest)
    await write_tombstone(operation, key)
    state = await blob_state(operation, key)
    if state.modified_at is None or state.modified_at >= older_than:
        await remove_tombstone(operation, key)
        return collected.missing if state.modified_at is None else collected.revived
    response = await operation.once("delete_object", key)
    if not response["ResponseMetadata"].get("RetryAttempts"):
        await remove_tombstone(operation, key)
    return collected.deleted
