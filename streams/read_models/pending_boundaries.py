"""What Tamiyo finds in the projections: boundaries that wait for a decision, and decisions left undone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from esper.schemas.topics import LIFECYCLE
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.read_models.view_row_reader import boundary_rows
from esper.streams.read_models.view_row_reader import (
    read_view_rows as read_view_rows,  # whoever finds a boundary reads it
)

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
class UncommandedDecision:
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


async def decisions_without_command(connection: Connection) -> list[UncommandedDecision]:
    """Decisions of runs under way that no command followed, by run and boundary; their views are folded."""
    found = queries("views").decisions_without_command(connection, abandoned_after=ABANDONED_AFTER, look_back=LOOK_BACK)
    return [UncommandedDecision(**dict(r)) async for r in found]


async def pending_boundaries(connection: Connection) -> list[PendingBoundary]:
    """The newest boundary of each run under way, where it has no decision; by run."""
    found = queries("views").newest_boundaries(connection, abandoned_after=ABANDONED_AFTER)
    pending = [PendingBoundary(**dict(r)) async for r in found]
    return [replace(p, is_complete=p.is_complete and await _is_line_complete(connection, p)) for p in pending]


async def _is_line_complete(connection: Connection, pending: PendingBoundary) -> bool:
    """Whether what older incarnations told of their seeds is folded as far as it counts."""
    if pending.incarnation == 1:
        return True
    line = await _older_line(connection, pending.run_id, pending.incarnation, pending.log_offset)
    sent = [(r["incarnation"], LIFECYCLE.name, r["lifecycle_sequence"]) for r in line]
    return not await _is_behind(connection, pending.run_id, sent)


async def is_complete(connection: Connection, run_id: str, incarnation: int, boundary: int) -> bool:
    """Whether all that a boundary's view depends on is folded. False where the boundary itself is not."""
    found = await boundary_rows(connection, [(run_id, incarnation, boundary)])
    if not found:
        return False
    (at,) = found.values()
    line = await _older_line(connection, run_id, incarnation, at["log_offset"])
    sent = [(incarnation, topic, sequence) for topic, sequence in at["last_sequences"].items()]
    sent += [(r["incarnation"], LIFECYCLE.name, r["lifecycle_sequence"]) for r in line]
    return not await _is_behind(connection, run_id, sent)


async def _older_line(connection: Connection, run_id: str, incarnation: int, log_offset: int) -> list[Any]:
    if incarnation == 1:
        return []
    line = {"run_ids": [run_id], "incarnations": [incarnation], "log_offsets": [log_offset]}
    return [r async for r in queries("views").older_lines(connection, **line)]


async def _is_behind(connection: Connection, run_id: str, sent: Sequence[tuple[int, str, int]]) -> bool:
    incarnations, topics, sequences = (list(column) for column in zip(*sent, strict=True)) if sent else ([], [], [])
    behind = {"run_id": run_id, "incarnations": incarnations, "topics": topics, "sequences": sequences}
    return bool(await queries("views").is_behind(connection, **behind))
