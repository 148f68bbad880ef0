"""control.tamiyo.views and .decisions -> views, decisions."""

from collections.abc import Sequence

from esper.schemas import events
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.batched_inserts import BatchedInserts
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import PartitionCache


async def project(connection: Connection, batch: Sequence[ProjectedEvent], _cache: PartitionCache) -> None:
    """Insert decisions and recorded views."""
    inserts = BatchedInserts()
    for projected in batch:
        columns = projected.columns
        match projected.data:
            case events.DecisionMade():
                inserts.add("insert_decisions", columns)
            case events.ViewRecorded() as event:
                inserts.add("insert_views", {**columns, "num_bytes": len(event.view_zstd)})
    await inserts.execute(connection, queries("tamiyo"))
