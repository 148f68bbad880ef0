"""Decides a batch of boundaries: reads their rows, calls the policy, writes decisions and commands to the log.

The order of the steps is the design:
1. Read the rows of all boundaries, in as many parallel parts as the pool has connections, each part in one
   REPEATABLE READ transaction with one query per table. Then assemble the views.
2. Call the policy once for all views. One policy version decides the whole batch.
3. Write the views to the log, and wait for the acknowledgement.
4. Write the decisions. No decision is in the log without its view: its command could not be sent again.
5. Write the commands of the decisions that count: the first in the log for their boundary.
Invariant: a failure of one boundary affects no other. If its view cannot be made, the boundary is retried and then gets
WAIT with the reason; if the policy fails on its view, it gets WAIT at once.
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
from esper.schemas.enums import Action
from esper.schemas.events import DecisionMade
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.control.decision_arbiter import DecisionArbiter
from esper.services.tamiyo.control.decision_events import (
    FAILED_VIEW_REASON,
    command_message,
    decision_message,
    view_message,
)
from esper.services.tamiyo.control.legal_choices import WAIT
from esper.services.tamiyo.control.pending_boundary_queue import PendingBoundaryQueue
from esper.services.tamiyo.metrics import TamiyoMetrics
from esper.services.tamiyo.policies import SampledChoice
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.streams.database.connection_types import Pool
from esper.streams.database.postgres_errors import CONNECTION_LOST_ERRORS
from esper.streams.database.postgres_errors import DRIVER_ERRORS as POSTGRES_DRIVER_ERRORS
from esper.streams.read_models.pending_boundaries import PendingBoundary
from esper.streams.read_models.view_row_reader import read_many_view_rows

TRANSIENT_ERRORS = (*KAFKA_TRANSIENT_ERRORS, OSError, *POSTGRES_DRIVER_ERRORS)
"""Errors that a later poll can succeed after: Kafka, Postgres or the network is away."""

MIN_PART = 8
"""Least number of boundaries per connection: a smaller part costs more queries than it saves time."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Decision:
    """A decision on its way to the log. ``view`` is None if none could be made, ``command`` is None for WAIT."""

    pending: PendingBoundary
    message: OonaMessage
    view: GraphView | None = None
    command: OonaMessage | None = None


class BatchDecider:
    """Decides batches. The caller opens and closes the clients that it is given."""

    def __init__(
        self,
        pool: Pool,
        producer: OonaProducer,
        arbiter: DecisionArbiter,
        queue: PendingBoundaryQueue,
        metrics: TamiyoMetrics,
        *,
        expiry_boundaries: int,
    ) -> None:
        self._pool, self._producer, self._arbiter = pool, producer, arbiter
        self._queue, self._metrics, self._expiry_boundaries = queue, metrics, expiry_boundaries

    async def decide(self, batch: Sequence[PendingBoundary], active: ActivePolicy) -> None:
        """Decide boundaries whose rows are complete.

        Raises:
            one of TRANSIENT_ERRORS: Postgres or Kafka is away. A later poll finds what is not in the log.
        """
        results = list(zip(batch, await self._read_views(batch), strict=True))
        viewed = [(pending, view) for pending, view in results if isinstance(view, GraphView)]
        sampled = await asyncio.to_thread(active.policy.choose_all, [view for _p, view in viewed]) if viewed else []
        decisions = [self._decision(*one, active) for one in zip(viewed, sampled, strict=True)]
        for pending, error in results:
            if isinstance(error, BaseException) and self._view_failed(pending, error):
                decisions.append(_wait(pending, active, FAILED_VIEW_REASON.format(_describe(error))))
        await self._write(decisions, active)

    async def decide_without_views(self, batch: Sequence[PendingBoundary], active: ActivePolicy, reason: str) -> None:
        """Decide WAIT for boundaries whose rows did not arrive.

        Raises:
            UnavailableError, NotAllowedError: as ``decide``.
        """
        await self._write([_wait(pending, active, reason) for pending in batch], active)

    async def _read_views(self, batch: Sequence[PendingBoundary]) -> list[GraphView | BaseException]:
        """Return the view of each boundary, or the error that prevented it."""
        num_parts = min(self._pool.get_max_size(), -(-len(batch) // MIN_PART))
        size = -(-len(batch) // num_parts)
        parts = [batch[n : n + size] for n in range(0, len(batch), size)]
        views = [view for part in await asyncio.gather(*map(self._read_part, parts)) for view in part]
        errors = [view for view in views if isinstance(view, TRANSIENT_ERRORS)]
        if errors and len(errors) == len(views):
            raise errors[0]
        return views

    async def _read_part(self, part: Sequence[PendingBoundary]) -> list[GraphView | BaseException]:
        """Read boundaries together; if that fails, one by one, to find which of them fails."""
        try:
            rows = await self._read_rows(part)
        except Exception as error:
            if len(part) == 1 or isinstance(error, CONNECTION_LOST_ERRORS):
                return [error] * len(part)
            return [view for pending in part for view in await self._read_part([pending])]
        return [_assemble(pending, one) for pending, one in zip(part, rows, strict=True)]

    async def _read_rows(self, part: Sequence[PendingBoundary]) -> list[ViewRows | None]:
        keys = [(pending.run_id, pending.incarnation, pending.boundary) for pending in part]
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            return await read_many_view_rows(connection, keys)

    def _decision(
        self, viewed: tuple[PendingBoundary, GraphView], sampled: SampledChoice, active: ActivePolicy
    ) -> _Decision:
        pending, view = viewed
        if sampled.error is not None:
            self._metrics.decision_failed("policy")
            with traced(pending.traceparent):
                _log.error("policy.failed", run=view.run_id, boundary=view.boundary, error=sampled.error)
        message = decision_message(pending, sampled, view, active)
        if sampled.choice.action is Action.WAIT:
            return _Decision(pending, message, view)
        assert isinstance(message.data, DecisionMade)
        command = command_message(
            message.data,
            sampled.choice,
            self._expiry_boundaries,
            decision_id=message.id,
            traceparent=message.traceparent,
        )
        return _Decision(pending, message, view, command)

    def _view_failed(self, pending: PendingBoundary, error: BaseException) -> bool:
        """Report a boundary whose view cannot be made, and schedule a retry; True if it was tried for long enough."""
        self._metrics.decision_failed("view")
        is_over = self._queue.view_failed(pending)
        with traced(pending.traceparent):
            log = _log.error if is_over else _log.warning
            fields = {"run": pending.run_id, "boundary": pending.boundary, "is_given_up": is_over}
            log("view.build_failed", error=_describe(error), **fields)
        return is_over

    async def _write(self, decisions: Sequence[_Decision], active: ActivePolicy) -> None:
        errors: list[EsperError] = []
        ready = await self._write_views(decisions, active, errors)
        results = await self._deliver([d.message for d in ready], errors)
        written = [(d, result) for d, result in zip(ready, results, strict=True) if isinstance(result, Position)]
        for decision, _position in written:
            self._report(decision)
        await self._write_commands([(d, position) for d, position in written if d.command is not None], errors)
        if errors:
            raise errors[0]

    async def _write_views(
        self, decisions: Sequence[_Decision], active: ActivePolicy, errors: list[EsperError]
    ) -> list[_Decision]:
        """Return the decisions that may be written. If the broker refuses a view (too large), the decision is WAIT."""
        ready = [d for d in decisions if d.view is None]
        viewed = [(d, d.view) for d in decisions if d.view is not None]
        results = await self._deliver([view_message(view, d.pending) for d, view in viewed], errors)
        for (decision, _view), result in zip(viewed, results, strict=True):
            pending = decision.pending
            if isinstance(result, Position):
                ready.append(decision)
            elif not isinstance(result, KAFKA_TRANSIENT_ERRORS):
                self._metrics.decision_failed("record")
                _log.error("view.refused", run=pending.run_id, boundary=pending.boundary, error=str(result))
                reason = FAILED_VIEW_REASON.format(f"Kafka refuses it: {result}")
                ready.append(_wait(pending, active, reason))
        return ready

    async def _write_commands(self, written: Sequence[tuple[_Decision, Position]], errors: list[EsperError]) -> None:
        """Write the commands of the decisions that count. A later poll finds the others in the projections."""
        if not written:
            return
        are_first = await self._arbiter.are_first([(d.message, position) for d, position in written])
        commands = [d.command for (d, _p), is_first in zip(written, are_first, strict=True) if is_first and d.command]
        self._metrics.decisions_superseded(len(written) - len(commands))
        for command, result in zip(commands, await self._deliver(commands, errors), strict=True):
            if isinstance(result, Position):
                assert command.causation_id is not None
                self._queue.mark_commanded(command.causation_id)
                self._metrics.command_recorded(is_resent=False)

    async def _deliver(
        self, messages: Sequence[OonaMessage], errors: list[EsperError]
    ) -> list[Position | EsperError | None]:
        """Return the position of each message, or the error that kept it out of the log.

        Transient errors are also added to ``errors``.
        """
        if not messages:
            return []
        found = await self._producer.deliver([encode(m) for m in messages])
        errors += [d.error for d in found if isinstance(d.error, KAFKA_TRANSIENT_ERRORS)]
        return [d.position if d.error is None else d.error for d in found]

    def _report(self, decision: _Decision) -> None:
        event = decision.message.data
        assert isinstance(event, DecisionMade)
        self._metrics.decision_recorded(decision.message, self._queue.mark_decided(decision.pending))
        if decision.command is None:
            return
        with traced(decision.pending.traceparent):
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


def _wait(pending: PendingBoundary, active: ActivePolicy, reason: str) -> _Decision:
    return _Decision(pending, decision_message(pending, SampledChoice(WAIT, 1.0, reason), None, active))


def _assemble(pending: PendingBoundary, rows: ViewRows | None) -> GraphView | BaseException:
    if rows is None:
        return UnavailableError(f"boundary {pending.boundary} of {pending.run_id} is no longer in the projections")
    try:
        view = assemble(rows)
        view.digest  # noqa: B018 - encodes the view here, so that an error affects this boundary alone
    except Exception as error:
        return error
    return view


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
