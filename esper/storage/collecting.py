"""Deletes blobs that nothing references, under notices that those who store see (see ``sweeps``).

Does not know what is referenced: it is told what is doomed. Invariant: a blob that was written
after ``older_than`` is not deleted, however late that write came.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from esper.errors import MissingBlobError, UnavailableError
from esper.storage.blobs import BlobStore
from esper.storage.keys import StoredBlob, key_of
from esper.storage.sweeps import SWEEP_S, post_notice, remove_ended, take_down

BATCH = 200  # blobs under one notice
MAX_PARALLEL = 10
REQUEST_S = 20.0  # a look and a delete are begun only if so much of the notice's time is left


@dataclass(slots=True)
class Collected:
    """What became of the doomed. ``unsure``: S3 did not say whether it deleted them; the next sweep sees."""

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
        UnavailableError: S3 is away; what was deleted is deleted, the rest is for the next sweep.
    """
    await remove_ended(blobs.client)
    done, waiting = Collected(), list(doomed)
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        waiting = await _sweep(blobs, batch, older_than, done, progress) + waiting
    return done


async def _sweep(
    blobs: BlobStore,
    batch: Sequence[StoredBlob],
    older_than: datetime,
    done: Collected,
    progress: Callable[[], None],
) -> list[StoredBlob]:
    """One notice, and what it is for; gives those that its time was too short for."""
    ends, is_clean = time.monotonic() + SWEEP_S - REQUEST_S, True
    notice = await post_notice(blobs.client, frozenset(key_of(b.kind, b.digest) for b in batch))
    todo, late = list(reversed(batch)), list[StoredBlob]()

    async def keep_deleting() -> None:
        nonlocal is_clean
        while todo:
            blob = todo.pop()
            is_clean = await _delete(blobs, blob, older_than, ends, done, late) and is_clean
            progress()

    # no TaskGroup: a request that is cancelled half-way is one that may still arrive
    results = await asyncio.gather(*(keep_deleting() for _n in range(MAX_PARALLEL)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    if is_clean:
        await take_down(blobs.client, notice)
    return late


async def _delete(
    blobs: BlobStore, blob: StoredBlob, older_than: datetime, ends: float, done: Collected, late: list[StoredBlob]
) -> bool:
    """Look once more, then delete; False where a request may still be on its way."""
    key = key_of(blob.kind, blob.digest)
    try:
        async with blobs.client.operation("delete", REQUEST_S) as operation:
            if time.monotonic() > ends:
                late.append(blob)
                return True
            found = await operation.call("head_object", key)
            if found["LastModified"] >= older_than:
                done.revived.append(blob)
                return True
            answer = await operation.once("delete_object", key)
    except MissingBlobError:
        done.gone.append(blob)
        return True
    except UnavailableError:
        done.unsure.append(blob)
        return False
    done.deleted.append(blob)
    return not answer["ResponseMetadata"].get("RetryAttempts")
