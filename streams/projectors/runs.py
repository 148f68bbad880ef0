"""system.runs -> runs, incarnations, layers, edges, epochs, boundaries, checkpoints, gaps."""

import json
from collections.abc import Sequence
from typing import Any

from esper.schemas import events
from esper.streams.memory import PartitionMemory
from esper.streams.projected import Projected
from esper.streams.queries import queries


async def project(connection: Any, batch: Sequence[Projected], _memory: PartitionMemory) -> None:
    """Fold the events of one partition, in their order."""
    for projected in batch:
        await _project_one(connection, projected)


async def _project_one(connection: Any, projected: Projected) -> None:
    sql, columns = queries("runs"), projected.columns
    match projected.data:
        case events.RunStarted() as event:
            await _started(connection, event, columns)
        case events.RunResumed() as event:
            await sql.insert_incarnation(connection, **_resumed(event, columns))
            await sql.resume_run(connection, **columns)
        case events.BoundaryReached() as event:
            columns["last_sequences"] = to_json(event.last_sequences)
            await sql.insert_boundary(connection, **columns)
            await sql.advance_run(connection, **columns)
        case events.EpochCompleted() as event:
            columns["metrics"] = to_json(event.metrics)
            await sql.insert_epoch(connection, **columns)
            await sql.advance_run(connection, **columns)
        case events.CheckpointSaved():
            await sql.insert_checkpoint(connection, **columns)
        case events.TelemetryGap():
            await sql.insert_gap(connection, **columns)
        case events.RunEnded() as event:
            columns["results"] = event.results.model_dump_json() if event.results else None
            await sql.end_run(connection, **columns)


def to_json(value: Any) -> str:
    """JSON in the one form that rows hold: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


async def _started(connection: Any, event: events.RunStarted, columns: dict[str, Any]) -> None:
    sql = queries("runs")
    await sql.insert_run(connection, **{**columns, "hyperparameters": to_json(event.hyperparameters)})
    layers = [{"run_id": event.run_id, "ordinal": n, **layer.model_dump()} for n, layer in enumerate(event.layers)]
    edges = [{"run_id": event.run_id, **edge.model_dump()} for edge in event.edges]
    await sql.insert_layer(connection, layers)
    await sql.insert_edge(connection, edges)
    await sql.insert_incarnation(connection, **{**columns, "from_incarnation": None, "from_step": 0, "seeds": "[]"})


def _resumed(event: events.RunResumed, columns: dict[str, Any]) -> dict[str, Any]:
    seeds = to_json([seed.model_dump(mode="json") for seed in event.seeds])
    return {**columns, "from_step": event.step, "seeds": seeds}
