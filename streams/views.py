"""What Tamiyo reads from the projections: boundaries that wait for a decision, and their rows."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from esper.graph.view import ViewRows
from esper.graph.windows import last_complete_window
from esper.schemas.topics import LIFECYCLE
from esper.streams.queries import queries


@dataclass(frozen=True, slots=True)
class PendingBoundary:
    """The newest boundary of a running run, if nobody decided for it yet.

    It is complete when every row that was sent before it has been folded.
    """

    run_id: str
    incarnation: int
    boundary: int
    step: int
    event_id: UUID
    traceparent: str | None
    at: datetime
    is_complete: bool


@dataclass(frozen=True, slots=True)
class UnsentDecision:
    """A decision whose command is not in the projections (yet), with what the command is made of."""

    run_id: str
    incarnation: int
    boundary: int
    step: int
    action: str
    layer_id: str
    seed_id: int
    blueprint_id: str | None
    event_id: UUID
    traceparent: str | None
    blueprint_version: int | None
    kernel_sha256: str | None
    size_bytes: int | None
    stage: str | None


async def decisions_without_command(connection: Any) -> list[UnsentDecision]:
    """Decisions of running runs that no command followed; by run and boundary."""
    found = _rows(queries("views").decisions_without_command(connection))
    return [UnsentDecision(**dict(r)) async for r in found]


async def pending_boundaries(connection: Any) -> list[PendingBoundary]:
    """The newest boundary of each run that runs, where it has no decision; by run."""
    rows = [dict(r) async for r in _rows(queries("views").newest_boundaries(connection))]
    return [PendingBoundary(**r) for r in rows if not r.pop("is_decided")]


async def read_view_rows(connection: Any, run_id: str, incarnation: int, boundary: int) -> ViewRows:
    """The rows of one boundary's view. Call it inside a REPEATABLE READ transaction."""
    sql = queries("views")
    at = dict(await sql.boundary(connection, run_id=run_id, incarnation=incarnation, boundary=boundary))
    at["last_sequences"] = json.loads(at["last_sequences"])
    mine = {"run_id": run_id, "incarnation": incarnation}
    resumed = await sql.resumed_seeds(connection, **mine)
    sequence = at["last_sequences"].get(LIFECYCLE.name, -1)
    epochs = [dict(r) async for r in _rows(sql.epochs(connection, **mine, step=at["step"]))]
    return ViewRows(
        boundary=at,
        layers=[r async for r in _rows(sql.layers(connection, run_id=run_id))],
        edges=[r async for r in _rows(sql.edges(connection, run_id=run_id))],
        resumed_seeds=json.loads(resumed) if resumed else [],
        lifecycle=[r async for r in _rows(sql.lifecycle(connection, **mine, sequence=sequence))],
        epochs=[{**r, "metrics": json.loads(r["metrics"])} for r in epochs],
        windows=[r async for r in _rows(sql.windows(connection, **mine, step=last_complete_window(at["step"])))],
        kernels=[r async for r in _rows(sql.kernels(connection, run_id=run_id))],
    )


async def _rows(found: Any) -> Any:
    """aiosql gives an async generator for a plain select."""
    async for row in found:
        yield row
