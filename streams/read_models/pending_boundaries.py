"""Tamiyo's work queue: boundaries without a decision, and decisions without a command.

Invariant: a boundary is reported complete only if every row that its view depends on is projected.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from esper.schemas.topics import LIFECYCLE
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.read_models.view_row_reader import boundary_rows

ABANDONED_AFTER = timedelta(days=1)
"""A running run that is this far behind the newest event of any running run counts as dead, and is skipped."""

LOOK_BACK = 16
"""How many of a run's newest decisions other than WAIT are searched for one without a command."""


@dataclass(frozen=True, slots=True)
class PendingBoundary:
    """The newest boundary of a running run that has no decision.

    ``is_complete``: every event that was sent before it is projected.
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
    """A decision whose command is not projected, and the position of its boundary's first recorded view."""

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
    """Decisions of running runs without a command, whose views are projected; sorted by run and boundary."""
    found = queries("views").decisions_without_command(connection, abandoned_after=ABANDONED_AFTER, look_back=LOOK_BACK)
    return [UncommandedDecision(**dict(r)) async for r in found]


async def pending_boundaries(connection: Connection) -> list[PendingBoundary]:
    """The newest boundary of each running run, if it has no decision; sorted by run."""
    found = queries("views").newest_boundaries(connection, abandoned_after=ABANDONED_AFTER)
    pending = [PendingBoundary(**dict(r)) async for r in found]
    return [replace(p, is_complete=p.is_complete and await _is_lineage_complete(connection, p)) for p in pending]


async def _is_lineage_complete(connection: Connection, pending: PendingBoundary) -> bool:
    """Whether the lifecycle events of older incarnations are projected as far as they count."""
    if pending.incarnation == 1:
        return True
    older = await _older_incarnations(connection, pending.run_id, pending.incarnation, pending.log_offset)
    sent = [(r["incarnation"], LIFECYCLE.name, r["lifecycle_sequence"]) for r in older]
    return not await _is_behind(connection, pending.run_id, sent)


async def is_complete(connection: Connection, run_id: str, incarnation: int, boundary: int) -> bool:
    """Whether every event that a boundary's view depends on is projected, the boundary included."""
    found = await boundary_rows(connection, [(run_id, incarnation, boundary)])
    if not found:
        return False
    (at,) = found.values()
    older = await _older_incarnations(connection, run_id, incarnation, at["log_offset"])
    sent = [(incarnation, topic, sequence) for topic, sequence in at["last_sequences"].items()]
    sent += [(r["incarnation"], LIFECYCLE.name, r["lifecycle_sequence"]) for r in older]
    return not await _is_behind(connection, run_id, sent)


async def _older_incarnations(connection: Connection, run_id: str, incarnation: int, log_offset: int) -> list[Any]:
    if incarnation == 1:
        return []
    key = {"run_ids": [run_id], "incarnations": [incarnation], "log_offsets": [log_offset]}
    return [r async for r in queries("views").older_incarnations(connection, **key)]


async def _is_behind(connection: Connection, run_id: str, sent: Sequence[tuple[int, str, int]]) -> bool:
    incarnations, topics, sequences = (list(column) for column in zip(*sent, strict=True)) if sent else ([], [], [])
    behind = {"run_id": run_id, "incarnations": incarnations, "topics": topics, "sequences": sequences}
    return bool(await queries("views").is_behind(connection, **behind))
