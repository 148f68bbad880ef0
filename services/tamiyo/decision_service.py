"""The decision service: polls for complete boundaries, decides them in batches, and sends missing commands again.

Invariant: a decision is in the log before its command. If the service stops in between, a later poll finds the decision
without a command and sends it, with the same id.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from esper.config import Settings
from esper.logging import get_logger, traced
from esper.oona.admin.topics import verify_topics
from esper.oona.producer import OonaProducer
from esper.retry import Backoff
from esper.schemas.topics import DECISIONS
from esper.services.tamiyo.control.batch_decider import TRANSIENT_ERRORS, BatchDecider
from esper.services.tamiyo.control.decision_arbiter import DecisionArbiter
from esper.services.tamiyo.control.decision_events import SOURCE, STALE_REASON, command_message
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.control.pending_boundary_queue import PendingBoundaryQueue
from esper.services.tamiyo.control.recorded_view import read_recorded_view
from esper.services.tamiyo.evaluation.automatic_rollback import AutomaticRollback
from esper.services.tamiyo.metrics import TamiyoMetrics
from esper.services.tamiyo.policies import EpsilonSoft, Policy
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.services.tamiyo.policies.policy_sources import PolicySource, configured_version, make_policy, sources_by_kind
from esper.services.tamiyo.settings import TamiyoSettings
from esper.services.tamiyo.versions.activation import announcement
from esper.services.tamiyo.versions.policy_follower import PolicyFollower
from esper.streams.database.connection_types import Pool
from esper.streams.database.connections import connect_pool
from esper.streams.database.stored_positions import stored_positions
from esper.streams.read_models.pending_boundaries import (
    PendingBoundary,
    UncommandedDecision,
    decisions_without_command,
    pending_boundaries,
)
from esper.streams.read_models.policy_versions import active_policy, policy_changes

RETRY_S = (0.2, 5.0)  # first and longest wait after a failed poll

_log = get_logger(__name__)


class DecisionService:
    """Async context manager; ``run`` decides until it is cancelled.

    Args:
        sources: the source of each kind of policy; by default those that Esper has.
    """

    def __init__(
        self, settings: Settings, tamiyo: TamiyoSettings, sources: Mapping[str, PolicySource] | None = None
    ) -> None:
        self._settings = settings
        self._tamiyo = tamiyo
        configured = configured_version(tamiyo)
        self.metrics = TamiyoMetrics(configured.policy_id, configured.version)
        self._follower = PolicyFollower(
            ActivePolicy(configured, self._soften(make_policy(tamiyo))),
            sources_by_kind(settings, tamiyo) if sources is None else sources,
            self._soften,
            self.metrics,
        )
        self._rollback = AutomaticRollback(tamiyo.rollback, tamiyo.rent, SOURCE)
        self._queue = PendingBoundaryQueue(tamiyo.stale_after_s)
        self._exits = AsyncExitStack()
        self._pool: Pool
        self._producer: OonaProducer
        self._arbiter: DecisionArbiter
        self._decider: BatchDecider

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exits:
            port = self.metrics.serve(self._tamiyo.metrics_address)
            exits.callback(self.metrics.stop)
            beating = asyncio.create_task(self.metrics.health.keep_beating(), name="tamiyo-beat")
            exits.callback(beating.cancel)
            kafka = self._settings.need_kafka()
            await verify_topics(kafka)
            self._pool = await exits.enter_async_context(connect_pool(self._settings.need_postgres()))
            self._producer = await exits.enter_async_context(OonaProducer(kafka, client_id="tamiyo"))
            async with self._pool.acquire() as connection:
                positions = await stored_positions(connection)
            start = {partition: offset for (topic, partition), offset in positions.items() if topic == DECISIONS.name}
            self._arbiter = await exits.enter_async_context(DecisionArbiter(kafka, start))
            parts = (self._pool, self._producer, self._arbiter, self._queue, self.metrics)
            self._decider = BatchDecider(*parts, expiry_boundaries=self._tamiyo.expiry_boundaries)
            exits.push_async_callback(self._follower.aclose)
            await self._load_active_policy()
            _log.info("tamiyo.metrics_served", port=port)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def run(self) -> None:
        """Poll until cancelled; retry while Kafka or Postgres is away."""
        _log.info("tamiyo.ready", policy=self._tamiyo.policy, epsilon=self._tamiyo.epsilon)
        backoff = Backoff(*RETRY_S)
        while True:
            try:
                await self.tick()
                self.metrics.poll_succeeded()
                backoff.reset()
                await asyncio.sleep(self._tamiyo.poll_s)
            except TRANSIENT_ERRORS as error:
                self.metrics.poll_failed(error)
                _log.warning("tamiyo.delayed", error=str(error))
                await backoff.wait()

    async def tick(self) -> None:
        """Poll once: decide the boundaries that are ready, batch by batch, and send missing commands again."""
        async with self._pool.acquire() as connection:
            change = await active_policy(connection) if self._is_following else None
            pending = await pending_boundaries(connection)
            uncommanded = await decisions_without_command(connection)
            rollback = await self._rollback.check(connection, change)
        if rollback is not None:
            await self._producer.send(rollback)
        undecided = [p for p in self._queue.update(pending) if not self._is_decided(p)]
        self.metrics.boundaries_found(undecided)
        if self._is_following:
            self._follower.update(change)
        ready, size = self._queue.ready(undecided), self._tamiyo.max_batch
        for batch in (ready.complete[n : n + size] for n in range(0, len(ready.complete), size)):
            await self._decider.decide(batch, self._follower.active)
        if ready.stale:
            reason = STALE_REASON.format(self._tamiyo.stale_after_s)
            await self._decider.decide_without_views(ready.stale, self._follower.active, reason)
        for decision in self._queue.due_commands(uncommanded):
            with traced(decision.traceparent):
                await self._resend_command(decision)

    def _is_decided(self, pending: PendingBoundary) -> bool:
        """Return whether the log has a decision that the projections do not show yet, usually another controller's."""
        return self._arbiter.is_decided(pending.run_id, pending.incarnation, pending.boundary)

    async def _resend_command(self, decision: UncommandedDecision) -> None:
        """Send the command of a decision in the log, with kernel and stage from the view that the decision names."""
        view = await read_recorded_view(self._settings.need_kafka(), decision)
        if view is None:
            self._abandon_command(decision, "the log does not hold its view")
            return
        choices = legal_choices(view)
        index = choices.find(decision)
        if index is None:
            self._abandon_command(decision, "its choice is not legal in its view")
            return
        command = command_message(
            decision,
            choices[index],
            self._tamiyo.expiry_boundaries,
            decision_id=decision.event_id,
            traceparent=decision.traceparent,
        )
        await self._producer.send(command)
        self._queue.mark_commanded(decision.event_id)
        self.metrics.command_recorded(is_resent=True)

    def _abandon_command(self, decision: UncommandedDecision, reason: str) -> None:
        self._queue.abandon_command(decision.event_id)
        fields = {"run": decision.run_id, "boundary": decision.boundary, "digest": decision.view_digest}
        _log.warning("decision.command_abandoned", reason=reason, **fields)

    @property
    def _is_following(self) -> bool:
        return self._tamiyo.policy == "active"

    def _soften(self, policy: Policy) -> EpsilonSoft:
        return EpsilonSoft(policy, self._tamiyo.epsilon, self._tamiyo.rng_seed)

    async def _load_active_policy(self) -> None:
        """Load the policy that decides, and announce it unless the log names it already."""
        async with self._pool.acquire() as connection:
            changes = await policy_changes(connection, include_by_settings=not self._is_following)
        if self._is_following:
            await self._follower.start(changes[0] if changes else None)
        message = announcement(configured_version(self._tamiyo), changes, SOURCE, is_fixed=not self._is_following)
        if message is not None:
            await self._producer.send(message)
