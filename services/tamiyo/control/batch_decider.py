"""A batch of boundaries, from their rows to their decisions in the log.

The order is the design:
1. the rows of all boundaries are read, in as many parts side by side as the pool has connections, each part in one
   REPEATABLE READ transaction and with one question a table; then the views are assembled;
2. the policy is asked once, for all of them; one version decides the whole batch;
3. the views go into the log together, and are acknowledged;
4. then the decisions: none is in the log without the view that it saw, or its command could not be sent again;
5. then the commands of those decisions that count, which are the first in the log for their boundary.
Invariant: one boundary's trouble is its own. One whose view cannot be made is tried again and then gets WAIT with the
reason; one on whose view the policy fails gets it at once; the others go on.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from esper.errors import EsperError, UnavailableError
from esper.graph.assembly import assemble
from esper.graph.graph_view import GraphView
from esper.graph.view_rows import ViewRows
from esper.logging import get_logger, traced
from esper.oona.broker_errors import TRANSIENT_ERRORS as KAFKA_TRANSIENT_ERRORS
from esper.oona.cloudevents import encode
from esper.oona.producer import OonaProducer
from esper.oona.records import Position
from esper.schemas.events import DecisionMade
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.control import decision_events
from esper.services.tamiyo.control.decision_arbiter import DecisionArbiter
from esper.services.tamiyo.control.decision_events import DecisionWithoutCommand
from esper.services.tamiyo.control.pending_boundary_queue import PendingBoundaryQueue
from esper.services.tamiyo.metrics import TamiyoMetrics
from esper.services.tamiyo.policies import SampledChoice
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.streams.database.connection_types import Pool
from esper.streams.database.postgres_errors import CONNECTION_LOST_ERRORS
from esper.streams.database.postgres_errors import DRIVER_ERRORS as POSTGRES_DRIVER_ERRORS
from esper.streams.read_models.pending_boundaries import PendingBoundary
from esper.streams.read_models.view_row_reader import read_many_view_rows

TRANSIENT = (*KAFKA_TRANSIENT_ERRORS, OSError, *POSTGRES_DRIVER_ERRORS)
"""What time can mend: Kafka, Postgres or the way to them is away."""

MIN_PART = 8
"""Boundaries that are read together at least, before another connection is taken for some of them."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Made:
    """One boundary's decision on its way into the log. ``view`` is None where there was none to see."""

    pending: PendingBoundary
    decision: OonaMessage
    view: GraphView | None = None
    unsent: DecisionWithoutCommand | None = None


class BatchDecider:
    """Decides batches; what it needs is opened and closed by who makes it."""

    def __init__(
        self,
        pool: Pool,
        producer: OonaProducer,
        first: DecisionArbiter,
        room: PendingBoundaryQueue,
        metrics: TamiyoMetrics,
        *,
        expiry_boundaries: int,
    ) -> None:
        self._pool, self._producer, self._first = pool, producer, first
        self._room, self._metrics, self._expiry_boundaries = room, metrics, expiry_boundaries

    async def decide(self, batch: Sequence[PendingBoundary], active: ActivePolicy) -> None:
        """Decide for boundaries that are complete.

        Raises:
            one of TRANSIENT: Postgres or Kafka is away; what is not in the log comes again.
        """
        views = await self._read_views(batch)
        seen = [(pending, view) for pending, view in zip(batch, views, strict=True) if isinstance(view, GraphView)]
        chosen = await asyncio.to_thread(active.policy.choose_all, [view for _pending, view in seen]) if seen else []
        made = [self._made(pending, view, one, active) for (pending, view), one in zip(seen, chosen, strict=True)]
        broken = [(p, view) for p, view in zip(batch, views, strict=True) if not isinstance(view, GraphView)]
        made += [m for pending, error in broken if (m := self._given_up(pending, error, active)) is not None]
        await self._write(made, active)

    async def decide_blindly(self, batch: Sequence[PendingBoundary], active: ActivePolicy, reason: str) -> None:
        """WAIT for boundaries whose rows did not come.

        Raises:
            UnavailableError, NotAllowedError: as ``decide``.
        """
        await self._write([_Made(p, decision_events.wait_without_view(p, active, reason)) for p in batch], active)

    async def _read_views(self, batch: Sequence[PendingBoundary]) -> list[GraphView | BaseException]:
        """The view of each, or what kept it from being made."""
        num_parts = min(self._pool.get_max_size(), -(-len(batch) // MIN_PART))
        size = -(-len(batch) // num_parts)
        parts = [batch[n : n + size] for n in range(0, len(batch), size)]
        found = await asyncio.gather(*map(self._read_part, parts))
        views = [view for part in found for view in part]
        errors = [view for view in views if isinstance(view, TRANSIENT)]
        if errors and len(errors) == len(views):
            raise errors[0]
        return views

    async def _read_part(self, part: Sequence[PendingBoundary]) -> list[GraphView | BaseException]:
        """Read together, or one by one where that fails, so that the one that breaks is known."""
        try:
            rows = await self._read_rows(part)
        except Exception as error:
            if len(part) == 1 or isinstance(error, CONNECTION_LOST_ERRORS):
                return [error] * len(part)
            return [view for pending in part for view in await self._read_part([pending])]
        return [_assembled(pending, one) for pending, one in zip(part, rows, strict=True)]

    async def _read_rows(self, part: Sequence[PendingBoundary]) -> list[ViewRows | None]:
        names = [(pending.run_id, pending.incarnation, pending.boundary) for pending in part]
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            return await read_many_view_rows(connection, names)

    def _made(self, pending: PendingBoundary, view: GraphView, chosen: SampledChoice, active: ActivePolicy) -> _Made:
        if chosen.error is not None:
            self._metrics.decision_failed("policy")
            with traced(pending.traceparent):
                _log.error("policy.failed", run=view.run_id, boundary=view.boundary, error=chosen.error)
        decision = decision_events.decision_message(view, chosen, pending, active)
        return _Made(pending, decision, view, decision_events.unsent_of(decision, chosen))

    def _given_up(
        self, pending: PendingBoundary, error: GraphView | BaseException, active: ActivePolicy
    ) -> _Made | None:
        """WAIT for a boundary whose view cannot be made, if it was tried for long enough."""
        told = f"{type(error).__name__}: {error}"
        self._metrics.decision_failed("view")
        is_over = self._room.broke(pending)
        with traced(pending.traceparent):
            tell = _log.error if is_over else _log.warning
            tell("view.build_failed", run=pending.run_id, boundary=pending.boundary, error=told, is_given_up=is_over)
        if not is_over:
            return None
        return _Made(
            pending, decision_events.wait_without_view(pending, active, decision_events.BROKEN_REASON.format(told))
        )

    async def _write(self, made: Sequence[_Made], active: ActivePolicy) -> None:
        errors: list[EsperError] = []
        written = await self._write_views(made, active, errors)
        places = await self._deliver([m.decision for m in written], errors)
        told = [(m, place) for m, place in zip(written, places, strict=True) if isinstance(place, Position)]
        for one, _place in told:
            self._note(one)
        await self._command([(m, place) for m, place in told if m.unsent is not None], errors)
        for error in errors:
            raise error

    async def _write_views(self, made: Sequence[_Made], active: ActivePolicy, errors: list[EsperError]) -> list[_Made]:
        """Those whose decision may follow; one whose view no broker takes (too large) waits, and says so."""
        seeing = [m for m in made if m.view is not None]
        places = await self._deliver(
            [decision_events.recorded_view(m.view, m.pending) for m in seeing if m.view], errors
        )
        written = [m for m in made if m.view is None]
        for one, place in zip(seeing, places, strict=True):
            if isinstance(place, Position):
                written.append(one)
            elif not isinstance(place, KAFKA_TRANSIENT_ERRORS):
                self._metrics.decision_failed("record")
                _log.error("view.refused", run=one.pending.run_id, boundary=one.pending.boundary, error=str(place))
                reason = decision_events.BROKEN_REASON.format(f"the log does not take it: {place}")
                written.append(_Made(one.pending, decision_events.wait_without_view(one.pending, active, reason)))
        return written

    async def _command(self, told: Sequence[tuple[_Made, Position]], errors: list[EsperError]) -> None:
        """Send the commands of the decisions that count. What is left out is found again in the projections."""
        if not told:
            return
        are_first = await self._first.are_first([(one.decision, place) for one, place in told])
        unsent = [
            one.unsent for (one, _place), is_first in zip(told, are_first, strict=True) if is_first and one.unsent
        ]
        self._metrics.decisions_superseded(len(told) - len(unsent))
        places = await self._deliver([decision_events.command_for(u, self._expiry_boundaries) for u in unsent], errors)
        for one, place in zip(unsent, places, strict=True):
            if isinstance(place, Position):
                self._room.commanded(one.event_id)
                self._metrics.command_recorded(is_resent=False)

    async def _deliver(
        self, messages: Sequence[OonaMessage], errors: list[EsperError]
    ) -> list[Position | EsperError | None]:
        """Write them together: the place of each, or what kept it from the log; what is away is noted in ``errors``."""
        if not messages:
            return []
        found = await self._producer.deliver([encode(m) for m in messages])
        errors += [d.error for d in found if isinstance(d.error, KAFKA_TRANSIENT_ERRORS)]
        return [d.position if d.error is None else d.error for d in found]

    def _note(self, one: _Made) -> None:
        event = one.decision.data
        assert isinstance(event, DecisionMade)
        self._metrics.decision_recorded(one.decision, self._room.decided(one.pending))
        if one.unsent is None:
            return
        with traced(one.pending.traceparent):
            _log.info(
                "decision.made",
                run=event.run_id,
                boundary=event.boundary,
                action=event.action,
                seed=f"{event.layer_id}:{event.seed_id}",
                probability=round(event.probability, 4),
                policy=f"{event.policy_id} v{event.policy_version}",
                reason=event.reason,
            )


def _assembled(pending: PendingBoundary, rows: ViewRows | None) -> GraphView | BaseException:
    if rows is None:
        return UnavailableError(f"boundary {pending.boundary} of {pending.run_id} is not in the projections any more")
    try:
        view = assemble(rows)
        view.digest  # noqa: B018 - encodes it: whatever is wrong with a view shows here, where it is this boundary's alone
    except Exception as error:
        return error
    return view
