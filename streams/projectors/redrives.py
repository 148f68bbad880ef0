"""system.redrives -> redrives."""

from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.streams.memory import PartitionMemory
from esper.streams.projected import Projected
from esper.streams.projectors.facts import write_rows
from esper.streams.queries import queries


async def project(connection: Any, batch: Sequence[Projected], _memory: PartitionMemory) -> None:
    """Record what was sent again, and why."""
    await write_rows(connection, queries("letters"), "insert_redrives", [_row(projected) for projected in batch])


def _row(projected: Projected) -> dict[str, Any]:
    event = projected.data
    assert isinstance(event, events.DeadLetterRedriven)
    return {**projected.columns, "log_partition": event.partition, "log_offset": event.offset}
