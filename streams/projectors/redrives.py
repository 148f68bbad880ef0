"""system.redrives -> redrives."""

from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.streams.memory import PartitionMemory
from esper.streams.projected import Projected
from esper.streams.queries import queries


async def project(connection: Any, batch: Sequence[Projected], _memory: PartitionMemory) -> None:
    """Record what was sent again, and why."""
    for projected in batch:
        event = projected.data
        assert isinstance(event, events.DeadLetterRedriven)
        origin = {"log_partition": event.partition, "log_offset": event.offset}
        await queries("letters").insert_redrive(connection, **{**projected.columns, **origin})
