"""Plans the garbage collection of blobs: which blobs no event references.

The order of the steps ensures that no referenced blob is collected:
1. lock out other collectors;
2. check that the bucket belongs to this cluster;
3. read S3's clock, and list the bucket;
4. wait until the projections hold every event that is in the log now;
5. read the references of the projections and the dead letters;
6. select the unreferenced blobs that are older than the grace period.
A blob that is stored after step 3 is younger than the grace period. An event that references a blob from before step
3 is in the log at step 4, since the grace period is also the time limit between storing a blob and referencing it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from esper.config import Settings
from esper.errors import ConfigError, ConflictError
from esper.oona.admin.topics import cluster_id
from esper.storage.blob_inspection import collectable, stored_blobs
from esper.storage.blob_keys import StoredBlob
from esper.storage.blobs import BlobStore
from esper.storage.bucket_owner import verify_owner
from esper.storage.tombstones import server_time
from esper.storage.uploads import DeadUpload, dead_uploads
from esper.streams.database.connections import connect, connect_pool
from esper.streams.read_models.blob_references import mentioned_digests, referenced_blobs, wait_until_projected

MIN_GRACE = timedelta(hours=1)
DEFAULT_GRACE = timedelta(days=7)
LAG_TIMEOUT_S = 30.0
_LOCK = "SELECT pg_try_advisory_lock(hashtext('esper storage gc'))"


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """What may be deleted: ``garbage`` blobs, and ``uploads`` that were started and never completed."""

    garbage: tuple[StoredBlob, ...]
    uploads: tuple[DeadUpload, ...]
    older_than: datetime
    num_stored: int
    num_referenced: int


@asynccontextmanager
async def planned_collection(
    settings: Settings, blobs: BlobStore, grace: timedelta = DEFAULT_GRACE, timeout_s: float = LAG_TIMEOUT_S
) -> AsyncIterator[CollectionPlan]:
    """Plan a collection. Execute the plan inside the context, which locks out other collectors.

    Raises:
        ConfigError: the grace period is shorter than ``MIN_GRACE``.
        ConflictError: another collector runs, or the bucket belongs to another cluster.
        PositionError, UnavailableError: the references are unknown; see ``wait_until_projected``.
    """
    if grace < MIN_GRACE:
        raise ConfigError(
            f"a grace period of {grace} is too short: a new blob is referenced only later; give at least {MIN_GRACE}"
        )
    kafka, postgres = settings.need_kafka(), settings.need_postgres()
    lock = await connect(postgres)
    try:
        if not await lock.fetchval(_LOCK):
            raise ConflictError("another `esper storage gc` is running: wait for its end")
        async with connect_pool(postgres) as pool, pool.acquire() as connection:
            await verify_owner(blobs.client, await cluster_id(kafka))
            older_than = await server_time(blobs.client) - grace
            stored = await stored_blobs(blobs)
            uploads = [upload async for upload in dead_uploads(blobs.client) if upload.begun_at < older_than]
            await wait_until_projected(connection, kafka, timeout_s)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                referenced = {digest for _kind, digest in await referenced_blobs(connection)}
                referenced |= await mentioned_digests(connection, kafka)
            garbage = sorted(collectable(stored, referenced, older_than), key=lambda b: (b.kind, b.digest))
        num_referenced = sum(b.digest in referenced for b in stored.values())
        yield CollectionPlan(tuple(garbage), tuple(uploads), older_than, len(stored), num_referenced)
    finally:
        await lock.close()
