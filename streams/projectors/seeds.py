"""control.kasmina.* and innovation.field-reports -> lifecycle, seeds, rejections, breakers, commands, reports."""

from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.schemas.lifecycle import is_allowed
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.batched_inserts import BatchedInserts, write_rows
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import PartitionCache

NO_KERNEL = {"blueprint_id": None, "kernel_sha256": None}
COMMANDED = (
    "event_id",
    "run_id",
    "incarnation",
    "boundary",
    "type",
    "decision_id",
    "layer_id",
    "seed_id",
    "blueprint_id",
    "kernel_sha256",
    "expires_at_step",
    "causation_id",
    "at",
)


async def project(connection: Connection, batch: Sequence[ProjectedEvent], _cache: PartitionCache) -> None:
    """Record facts in their order. An impossible transition is recorded and flagged, not refused."""
    sql, inserts, moved = queries("seeds"), BatchedInserts(), dict[tuple[Any, ...], dict[str, Any]]()
    for projected in batch:
        columns = projected.columns
        match projected.data:
            case events.SeedTransitioned() as event:
                columns["is_impossible"] = not is_allowed(event.from_stage, event.to_stage)
                inserts.add("insert_transitions", columns)
                _move(moved, event, columns)
            case events.CommandRejected():
                inserts.add("insert_rejections", columns)
            case events.BreakerChanged():
                inserts.add("insert_breaker_changes", columns)
            case events.SeedCommand():
                told = {**NO_KERNEL, **columns}
                inserts.add("insert_commands", {name: told[name] for name in COMMANDED})
            case events.FieldReported() as event:
                inserts.add("insert_field_reports", {**columns, **_of_fork(event.fork)})
    await inserts.write(connection, sql)
    await write_rows(connection, sql, "move_seeds", list(moved.values()))


def _of_fork(fork: events.ForkedPair | None) -> dict[str, Any]:
    names = events.ForkedPair.model_fields
    return dict.fromkeys(names) if fork is None else {name: getattr(fork, name) for name in names}


def _move(moved: dict[tuple[Any, ...], dict[str, Any]], event: events.SeedTransitioned, columns: Any) -> None:
    """A seed is where its move of the highest step left it: a redriven event tells of the past."""
    key = (event.run_id, event.incarnation, event.layer_id, event.seed_id)
    if key not in moved or moved[key]["step"] <= event.step:
        moved[key] = columns
