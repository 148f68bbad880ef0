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
COMMAND_COLUMNS = (
    *("event_id", "run_id", "incarnation", "boundary", "type", "decision_id", "layer_id", "seed_id"),
    *("blueprint_id", "kernel_sha256", "expires_at_step", "causation_id", "at"),
)


async def project(connection: Connection, batch: Sequence[ProjectedEvent], _cache: PartitionCache) -> None:
    """Insert the events, and update each seed. An impossible transition is inserted and flagged, not rejected."""
    sql, inserts, moved = queries("seeds"), BatchedInserts(), dict[tuple[Any, ...], dict[str, Any]]()
    for projected in batch:
        columns = projected.columns
        match projected.data:
            case events.SeedTransitioned() as event:
                columns["is_impossible"] = not is_allowed(event.from_stage, event.to_stage)
                inserts.add("insert_transitions", columns)
                _update_seed(moved, event, columns)
            case events.CommandRejected():
                inserts.add("insert_rejections", columns)
            case events.BreakerChanged():
                inserts.add("insert_breaker_changes", columns)
            case events.SeedCommand():
                fields = {**NO_KERNEL, **columns}
                inserts.add("insert_commands", {name: fields[name] for name in COMMAND_COLUMNS})
            case events.FieldReported() as event:
                inserts.add("insert_field_reports", {**columns, **_fork_columns(event.fork)})
    await inserts.execute(connection, sql)
    await write_rows(connection, sql, "upsert_seeds", list(moved.values()))


def _fork_columns(fork: events.ForkedPair | None) -> dict[str, Any]:
    names = events.ForkedPair.model_fields
    return dict.fromkeys(names) if fork is None else {name: getattr(fork, name) for name in names}


def _update_seed(moved: dict[tuple[Any, ...], dict[str, Any]], event: events.SeedTransitioned, columns: Any) -> None:
    """Keep the transition with the highest step: a redriven event must not move a seed back."""
    key = (event.run_id, event.incarnation, event.layer_id, event.seed_id)
    if key not in moved or moved[key]["step"] <= event.step:
        moved[key] = columns
