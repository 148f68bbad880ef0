"""control.tamiyo.views and .decisions -> views, decisions."""

from collections.abc import Sequence

from esper.schemas import events
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.facts import Facts
from esper.streams.projectors.projected_event import Projected
from esper.streams.worker.partition_memory import PartitionMemory


async def project(connection: Connection, batch: Sequence[Projected], _memory: PartitionMemory) -> None:
    """Record what Tamiyo saw and chose, in the order of the log."""
    facts = Facts()
    for projected in batch:
        columns = projected.columns
        match projected.data:
            case events.DecisionMade():
                facts.add("insert_decisions", columns)
            case events.ViewRecorded() as event:
                facts.add("insert_views", {**columns, "num_bytes": len(event.view_zstd)})
    await facts.write(connection, queries("tamiyo"))
