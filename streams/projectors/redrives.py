"""system.redrives -> redrives."""

from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.batched_inserts import write_rows
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import PartitionCache


async def project(connection: Connection, batch: Sequence[ProjectedEvent], _cache: PartitionCache) -> None:
    """Insert the redrives of dead letters with their reasons."""
    await write_rows(connection, queries("dead_letters"), "insert_redrives", [_row(projected) for projected in batch])


def _row(projected: ProjectedEvent) -> dict[str, Any]:
    event = projected.data
    assert isinstance(event, events.DeadLetterRedriven)
    return {**projected.columns, "log_partition": event.partition, "log_offset": event.offset}
