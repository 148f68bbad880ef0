"""Collecting what nothing references: the one order of steps in which no referenced blob can go.

1. one collector at a time; 2. the bucket is this cluster's; 3. S3's clock, and what the bucket has;
4. the projections hold every event that the log has now; 5. what they name, and what dead letters name;
6. the rest, as far as it is older than the grace period, may go. A blob that is stored after 3 is
younger than that; an event that names one stored before 3 is in the log at 4, because whoever stores a
blob has the grace period to name it, and no longer.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from esper.config import Settings
from esper.errors import ConfigError, ConflictError
from esper.oona.admin.topics import cluster_id
from esper.storage.blob_keys import StoredBlob
from esper.storage.blobs import BlobStore
from esper.storage.bucket_owner import verify_owner
from esper.storage.inventory import collectable, stored_blobs
from esper.storage.tombstones import server_time
from esper.storage.uploads import DeadUpload, dead_uploads
from esper.streams.database.connections import connect, connect_pool
from esper.streams.read_models.blob_references import mentioned_digests, referenced_blobs, wait_until_projected

MIN_GRACE = timedelta(hours=1)
DEFAULT_GRACE = timedelta(days=7)
LAG_PATIENCE_S = 30.0
_LOCK = "SELECT pg_try_advisory_lock(hashtext('esper storage gc'))"


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """What may go: ``doomed`` blobs and ``uploads`` that were begun and never completed."""

    doomed: tuple[StoredBlob, ...]
    uploads: tuple[DeadUpload, ...]
    older_than: datetime
    num_stored: int
    num_referenced: int


@asynccontextmanager
async def planned_collection(
    settings: Settings, blobs: BlobStore, grace: timedelta = DEFAULT_GRACE, patience_s: float = LAG_PATIENCE_S
) -> AsyncIterator[CollectionPlan]:
    """What may be collected; carry it out inside, where no other collector can be.

    Raises:
        ConfigError: the grace period is too short for what is stored to be registered.
        ConflictError: another collector is at work, or the bucket belongs to another cluster.
        PositionError, UnavailableError: the projections do not say what is referenced; see ``wait_until_folded``.
    """
    if grace < MIN_GRACE:
        raise ConfigError(
            f"a grace period of {grace} is too short: what was stored is registered later; {MIN_GRACE} at least"
        )
    kafka, postgres = settings.need_kafka(), settings.need_postgres()
    lock = await connect(postgres)
    try:
        if not await lock.fetchval(_LOCK):
            raise ConflictError("another `esper storage gc` is under way: wait for its end")
        async with connect_pool(postgres) as pool, pool.acquire() as connection:
            await verify_owner(blobs.client, await cluster_id(kafka))
            older_than = await server_time(blobs.client) - grace
            stored = await stored_blobs(blobs)
            uploads = [upload async for upload in dead_uploads(blobs.client) if upload.begun_at < older_than]
            await wait_until_projected(connection, kafka, patience_s)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                named = {digest for _kind, digest in await referenced_blobs(connection)}
                named |= await mentioned_digests(connection, kafka)
            doomed = sorted(collectable(stored, named, older_than), key=lambda b: (b.kind, b.digest))
        num_referenced = sum(b.digest in named for b in stored.values())
        yield CollectionPlan(tuple(doomed), tuple(uploads), older_than, len(stored), num_referenced)
    finally:
        await lock.close()
