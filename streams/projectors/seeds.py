"""control.kasmina.* and innovation.field-reports -> lifecycle, seeds, rejections, breakers, commands, reports."""

from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.schemas.lifecycle import is_allowed
from esper.streams.memory import PartitionMemory
from esper.streams.projected import Projected
from esper.streams.queries import queries


async def project(connection: Any, batch: Sequence[Projected], _memory: PartitionMemory) -> None:
    """Record facts in their order. An impossible transition is recorded and flagged, not refused."""
    sql = queries("seeds")
    for projected in batch:
        columns = projected.columns
        match projected.data:
            case events.SeedTransitioned() as event:
                columns["is_impossible"] = not is_allowed(event.from_stage, event.to_stage)
                await sql.insert_transition(connection, **columns)
                await sql.move_seed(connection, **columns)
            case events.CommandRejected():
                await sql.insert_rejection(connection, **columns)
            case events.BreakerChanged():
                await sql.insert_breaker_change(connection, **columns)
            case events.SeedCommand():
                absent = {"blueprint_id": None, "kernel_sha256": None}
                await sql.insert_command(connection, **{**absent, **columns})
            case events.FieldReported():
                await sql.insert_field_report(connection, **columns)
