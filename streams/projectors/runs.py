"""system.runs -> runs, incarnations, layers, edges, epochs, boundaries, checkpoints, gaps."""

import json
from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.schemas.enums import RunStatus
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.batched_inserts import BatchedInserts, write_rows
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import PartitionCache

Row = dict[str, Any]
FIRST_INCARNATION = {"from_incarnation": None, "from_step": 0, "from_epoch": 0}


async def project(connection: Connection, batch: Sequence[ProjectedEvent], _cache: PartitionCache) -> None:
    """Insert the events, and update each run to the state of its newest incarnation."""
    sql, inserts = queries("runs"), BatchedInserts()
    run_ids = sorted({p.data.run_id for p in batch if isinstance(p.data, events.RunEvent)})
    before = {r["run_id"]: dict(r) async for r in sql.runs_of(connection, run_ids=run_ids)}
    after = {run_id: dict(row) for run_id, row in before.items()}
    for projected in batch:
        columns = projected.columns
        _add_inserts(inserts, projected, columns)
        _update_run(after, projected, columns)
    await inserts.execute(connection, sql)
    changed = [row for run_id, row in after.items() if row != before.get(run_id)]
    await write_rows(connection, sql, "upsert_runs", changed)


def to_json(value: Any) -> str:
    """Canonical JSON for columns: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _add_inserts(inserts: BatchedInserts, projected: ProjectedEvent, columns: Row) -> None:
    match projected.data:
        case events.RunStarted() as event:
            layers = [{"run_id": event.run_id, "ordinal": n, **x.model_dump()} for n, x in enumerate(event.layers)]
            inserts.add("insert_layers", *layers)
            inserts.add("insert_edges", *({"run_id": event.run_id, **edge.model_dump()} for edge in event.edges))
            inserts.add("insert_incarnations", _incarnation(columns, **FIRST_INCARNATION, seeds="[]"))
        case events.RunResumed() as event:
            seeds = to_json([seed.model_dump(mode="json") for seed in event.seeds])
            origin = {"from_incarnation": event.from_incarnation, "from_step": event.step, "from_epoch": event.epoch}
            inserts.add("insert_incarnations", _incarnation(columns, **origin, seeds=seeds))
        case events.BoundaryReached() as event:
            inserts.add("insert_boundaries", {**columns, "last_sequences": to_json(event.last_sequences)})
        case events.EpochCompleted() as event:
            inserts.add("insert_epochs", {**columns, "metrics": to_json(event.metrics)})
        case events.CheckpointSaved():
            inserts.add("insert_checkpoints", columns)
        case events.TelemetryGap():
            inserts.add("insert_gaps", columns)


def _incarnation(columns: Row, **others: Any) -> Row:
    names = ("run_id", "incarnation", "command_offset", "event_id", "causation_id", "at", "log_offset")
    return {**{name: columns[name] for name in names}, **others}


def _update_run(rows: dict[str, Row], projected: ProjectedEvent, columns: Row) -> None:
    """Update a run's row, but never backwards by a redriven event or one of an older incarnation."""
    event = projected.data
    if isinstance(event, events.RunStarted):
        rows.setdefault(event.run_id, _new_run(event, columns))
        return
    row = rows.get(event.run_id) if isinstance(event, events.TrainerEvent) else None
    if row is None or not isinstance(event, events.TrainerEvent):
        return
    is_newest = row["incarnation"] == event.incarnation
    match event:
        case events.RunResumed() if row["incarnation"] < event.incarnation:
            row |= {"incarnation": event.incarnation, "step": event.step, "epoch": event.epoch}
            row["told_at"] = columns["logged_at"]
            row |= {"status": RunStatus.RUNNING, "results": None, "detail": "", "ended_at": None}
        case events.BoundaryReached() | events.EpochCompleted() if is_newest and row["step"] <= event.step:
            row |= {"step": event.step, "epoch": event.epoch}
            row["told_at"] = max(row["told_at"], columns["logged_at"])
        case events.RunEnded() if is_newest:
            results = event.results.model_dump_json() if event.results else None
            row |= {"status": event.status, "step": event.step, "results": results}
            row |= {"detail": event.detail, "ended_at": columns["at"]}


def _new_run(event: events.RunStarted, columns: Row) -> Row:
    return {
        "run_id": event.run_id,
        "model": event.model,
        "status": RunStatus.RUNNING,
        "incarnation": 1,
        "step": 0,
        "epoch": 0,
        "hyperparameters": to_json(event.hyperparameters),
        "results": None,
        "detail": "",
        "started_at": columns["at"],
        "ended_at": None,
        "told_at": columns["logged_at"],
    }
