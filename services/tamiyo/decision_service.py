"""The decision service: finds complete boundaries, decides them in batches, sends again what was left undone.

Invariant: a decision is in the log before its command. What dies in between is found again: a
decision that no command followed gets its command, with the same id.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from esper.config import Settings
from esper.logging import get_logger, traced
from esper.oona.admin.topics import verify_topics
from esper.oona.producer import OonaProducer
from esper.retry import Backoff
from esper.schemas.topics import DECISIONS
from esper.services.tamiyo.control import decision_events
from esper.services.tamiyo.control.batch_decider import TRANSIENT, BatchDecider
from esper.services.tamiyo.control.decision_arbiter import DecisionArbiter
from esper.services.tamiyo.control.pending_boundary_queue import PendingBoundaryQueue
from esper.services.tamiyo.control.recorded_view import seen_view
from esper.services.tamiyo.evaluation.policy_guard import PolicyGuard
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

RETRY_S = (0.2, 5.0)

_log = get_logger(__name__)


class DecisionService:
    """Async context manager; ``run`` until it is cancelled.

    Args:
        kinds: kind -> where its policies come from; Esper's own where none are given.
    """

    def __init__(
        self, settings: Settings, tamiyo: TamiyoSettings, kinds: Mapping[str, PolicySource] | None = None
    ) -> None:
        self._settings = settings
        self._tamiyo = tamiyo
        own = configured_version(tamiyo)
        self.metrics = TamiyoMetrics(own.policy_id, own.version)
        self._follower = PolicyFollower(
            ActivePolicy(own, self._soften(make_policy(tamiyo))),
            sources_by_kind(settings, tamiyo) if kinds is None else kinds,
            self._soften,
            self.metrics,
        )
        self._guard = PolicyGuard(tamiyo.guard, tamiyo.rent, decision_events.SOURCE)
        self._room = PendingBoundaryQueue(tamiyo.stale_after_s)
        self._exits = AsyncExitStack()
        self._pool: Pool
        self._producer: Any = None
        self._first: Any = None
        self._decider: Any = None

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
                folded = await stored_positions(connection)
            start = {partition: offset for (topic, partition), offset in folded.items() if topic == DECISIONS.name}
            self._first = await exits.enter_async_context(DecisionArbiter(kafka, start))
            parts = (self._pool, self._producer, self._first, self._room, self.metrics)
            self._decider = BatchDecider(*parts, expiry_boundaries=self._tamiyo.expiry_boundaries)
            exits.push_async_callback(self._follower.aclose)
            await self._begin()
            _log.info("tamiyo.metrics_served", port=port)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def run(self) -> None:
        """Decide until cancelled; keep trying while Kafka or Postgres is away."""
        _log.info("tamiyo.ready", policy=self._tamiyo.policy, epsilon=self._tamiyo.epsilon)
        backoff = Backoff(*RETRY_S)
        while True:
            try:
                await self.tick()
                self.metrics.poll_succeeded()
                backoff.reset()
                await asyncio.sleep(self._tamiyo.poll_s)
            except TRANSIENT as error:
                self.metrics.poll_failed(error)
                _log.warning("tamiyo.delayed", error=str(error))
                await backoff.wait()

    async def tick(self) -> None:
        """Look once: decide what can be decided, batch by batch, and send again what was left undone."""
        async with self._pool.acquire() as connection:
            active = await active_policy(connection) if self._is_following else None
            pending = await pending_boundaries(connection)
            undone = await decisions_without_command(connection)
            gone_back = await self._guard.look(connection, active)
        if gone_back is not None:
            await self._producer.send(gone_back)
        waiting = [p for p in self._room.look(pending) if not self._is_decided(p)]
        self.metrics.boundaries_found(waiting)
        if self._is_following:
            self._follower.look(active)
        due, size = self._room.due(waiting), self._tamiyo.max_batch
        for batch in (due.complete[n : n + size] for n in range(0, len(due.complete), size)):
            await self._decider.decide(batch, self._follower.active)
        if due.stale:
            reason = decision_events.STALE_REASON.format(self._tamiyo.stale_after_s)
            await self._decider.decide_blindly(due.stale, self._follower.active, reason)
        for decision in self._room.left_undone(undone):
            with traced(decision.traceparent):
                await self._carry_out(decision)

    def _is_decided(self, pending: PendingBoundary) -> bool:
        """Whether the log has a decision for it that is not folded yet: as a rule another controller's."""
        return bool(self._first.is_decided(pending.run_id, pending.incarnation, pending.boundary))

    async def _carry_out(self, undone: UncommandedDecision) -> None:
        """Send the command of a decision that was made before; it names what the decision saw."""
        view = await seen_view(self._settings.need_kafka(), undone)
        unsent = None if view is None else decision_events.unsent_again(undone, view)
        if unsent is None:
            self._room.given_up(undone.event_id)  # the log will not say more of it
            _log.warning(
                "decision.view_missing",
                run=undone.run_id,
                boundary=undone.boundary,
                digest=undone.view_digest,
                detail="no command is sent: the log does not hold what this decision saw",
            )
            return
        await self._producer.send(decision_events.command_for(unsent, self._tamiyo.expiry_boundaries))
        self._room.commanded(undone.event_id)
        self.metrics.command_recorded(is_resent=True)

    @property
    def _is_following(self) -> bool:
        return self._tamiyo.policy == "active"

    def _soften(self, policy: Policy) -> EpsilonSoft:
        return EpsilonSoft(policy, self._tamiyo.epsilon, self._tamiyo.rng_seed)

    async def _begin(self) -> None:
        """Load who decides, and say who does, unless the log says so already."""
        async with self._pool.acquire() as connection:
            changes = await policy_changes(connection, include_by_settings=not self._is_following)
        if self._is_following:
            await self._follower.start(changes[0] if changes else None)
        told = announcement(
            configured_version(self._tamiyo), changes, decision_events.SOURCE, is_fixed=not self._is_following
        )
        if told is not None:
            await self._producer.send(told)
