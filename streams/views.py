"""What Tamiyo reads from the projections: boundaries that wait for a decision, and their rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from esper.errors import UnavailableError
from esper.graph.features import MAX_EPOCHS, RECENT_STEPS
from esper.graph.rows import Row, ViewRows
from esper.graph.windows import WINDOW_STEPS, last_complete_window
from esper.schemas.topics import BLUEPRINTS, LIFECYCLE, TELEMETRY
from esper.streams.queries import queries

ABANDONED_AFTER = timedelta(days=1)
"""A run under way that told nothing for so long, measured from the newest word of any run, is not looked at."""

LOOK_BACK = 16
"""A decision without a command is looked for among so many of a run's newest that are not WAIT."""


@dataclass(frozen=True, slots=True)
class PendingBoundary:
    """The newest boundary of a running run, if nobody decided for it yet.

    It is complete when every row that was sent before it has been folded.
    """

    run_id: str
    incarnation: int
    boundary: int
    step: int
    log_offset: int
    event_id: UUID
    traceparent: str | None
    at: datetime
    is_complete: bool


@dataclass(frozen=True, slots=True)
class UndoneDecision:
    """A decision whose command is not in the projections (yet), and where the first view of its boundary lies."""

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
    view_digest: str
    view_partition: int
    view_offset: int


async def decisions_without_command(connection: Any) -> list[UndoneDecision]:
    """Decisions of runs under way that no command followed, by run and boundary; their views are folded."""
    found = queries("views").decisions_without_command(connection, abandoned_after=ABANDONED_AFTER, look_back=LOOK_BACK)
    return [UndoneDecision(**dict(r)) async for r in found]


async def pending_boundaries(connection: Any) -> list[PendingBoundary]:
    """The newest boundary of each run under way, where it has no decision; by run."""
    found = queries("views").newest_boundaries(connection, abandoned_after=ABANDONED_AFTER)
    pending = [PendingBoundary(**dict(r)) async for r in found]
    return [replace(p, is_complete=p.is_complete and await _is_line_complete(connection, p)) for p in pending]


async def _is_line_complete(connection: Any, pending: PendingBoundary) -> bool:
    """Whether what older incarnations told of their seeds is folded as far as it counts."""
    if pending.incarnation == 1:
        return True
    line = await _older_line(connection, pending.run_id, pending.incarnation, pending.log_offset)
    sent = [(r["incarnation"], LIFECYCLE.name, r["lifecycle_sequence"]) for r in line]
    return not await _is_behind(connection, pending.run_id, sent)


async def is_complete(connection: Any, run_id: str, incarnation: int, boundary: int) -> bool:
    """Whether all that a boundary's view depends on is folded. False where the boundary itself is not."""
    at = await _boundary(connection, run_id, incarnation, boundary)
    if at is None:
        return False
    line = await _older_line(connection, run_id, incarnation, at["log_offset"])
    sent = [(incarnation, topic, sequence) for topic, sequence in at["last_sequences"].items()]
    sent += [(r["incarnation"], LIFECYCLE.name, r["lifecycle_sequence"]) for r in line]
    return not await _is_behind(connection, run_id, sent)


async def read_view_rows(
    connection: Any, run_id: str, incarnation: int, boundary: int, blueprint_offsets: Sequence[int] | None = None
) -> ViewRows:
    """The rows of one boundary's view. Call it inside a REPEATABLE READ transaction.

    The same boundary and offsets give the same view, whenever it is read, once the boundary is complete.

    Args:
        blueprint_offsets: how far each partition of innovation.blueprints counts, to see a view again
            as it was; as far as it is folded where none are given.

    Raises:
        UnavailableError: the boundary is not folded (yet).
    """
    at = await _boundary(connection, run_id, incarnation, boundary)
    if at is None:
        raise UnavailableError(f"boundary {boundary} of {run_id}, incarnation {incarnation}, is not folded yet")
    sql, mine, before = queries("views"), {"run_id": run_id, "incarnation": incarnation}, at["log_offset"]
    told = at["last_sequences"].get(LIFECYCLE.name, -1)
    line = [{"incarnation": incarnation, "lifecycle_sequence": told}]
    line += await _older_line(connection, run_id, incarnation, before)
    window = last_complete_window(at["step"])
    offsets = await _blueprint_offsets(connection) if blueprint_offsets is None else tuple(blueprint_offsets)
    epochs = await _all(sql.epochs(connection, **mine, log_offset=before, max_epochs=MAX_EPOCHS))
    is_started = at["hyperparameters"] is not None
    return ViewRows(
        boundary={
            **at,
            "hyperparameters": json.loads(at["hyperparameters"] or "{}"),
            "from_step": at["from_step"] or 0,
        },
        layers=await _all(sql.layers(connection, run_id=run_id)) if is_started else [],
        edges=await _all(sql.edges(connection, run_id=run_id)) if is_started else [],
        line=line,
        resumed_seeds=json.loads(at["seeds"] or "[]"),
        lifecycle=await _lifecycle(connection, run_id, line),
        breakers=await _all(sql.breakers(connection, **mine, sequence=told)),
        rejections=await _all(sql.rejections(connection, **mine, sequence=told, after_step=at["step"] - RECENT_STEPS)),
        epochs=[{**r, "metrics": json.loads(r["metrics"])} for r in epochs],
        num_epochs=epochs[0]["num_epochs"] if epochs else 0,
        gaps=await _all(sql.gaps(connection, **mine, log_offset=before, from_step=window - WINDOW_STEPS)),
        windows=await _all(
            sql.windows(
                connection,
                **mine,
                steps=[window - WINDOW_STEPS, window],
                sequence=at["last_sequences"].get(TELEMETRY.name, -1),
            )
        ),
        kernels=await _all(sql.kernels(connection, run_id=run_id, offsets=offsets)) if is_started else [],
        blueprint_offsets=offsets,
    )


async def _boundary(connection: Any, run_id: str, incarnation: int, boundary: int) -> dict[str, Any] | None:
    found = await queries("views").boundary(connection, run_id=run_id, incarnation=incarnation, boundary=boundary)
    return None if found is None else {**found, "last_sequences": json.loads(found["last_sequences"])}


async def _older_line(connection: Any, run_id: str, incarnation: int, log_offset: int) -> list[Any]:
    if incarnation == 1:
        return []
    line = {"run_id": run_id, "incarnation": incarnation, "log_offset": log_offset}
    return await _all(queries("views").older_line(connection, **line))


async def _lifecycle(connection: Any, run_id: str, line: Sequence[Row]) -> list[Any]:
    numbers, sequences = [r["incarnation"] for r in line], [r["lifecycle_sequence"] for r in line]
    return await _all(queries("views").lifecycle(connection, run_id=run_id, incarnations=numbers, sequences=sequences))


async def _is_behind(connection: Any, run_id: str, sent: Sequence[tuple[int, str, int]]) -> bool:
    incarnations, topics, sequences = (list(column) for column in zip(*sent, strict=True)) if sent else ([], [], [])
    behind = {"run_id": run_id, "incarnations": incarnations, "topics": topics, "sequences": sequences}
    return bool(await queries("views").is_behind(connection, **behind))


async def _blueprint_offsets(connection: Any) -> tuple[int, ...]:
    found: Mapping[int, int] = {
        r["log_partition"]: r["next_offset"] for r in await _all(queries("views").blueprint_positions(connection))
    }
    return tuple(found.get(n, 0) for n in range(BLUEPRINTS.num_partitions))


async def _all(found: Any) -> list[Any]:
    """aiosql gives an async generator for a plain select."""
    return [row async for row in found]
