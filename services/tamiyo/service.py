"""The decision service: finds complete boundaries, decides, writes view, decision and command.

Invariant: a decision is in the log before its command. What dies in between is found again: a
decision that no command followed gets its command, with the same id.
"""

import asyncio
import math
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import asyncpg

from esper.config import Settings
from esper.errors import NotAllowedError, UnavailableError
from esper.graph.assembling import assemble
from esper.logging import get_logger, traced
from esper.oona.producer import OonaProducer
from esper.oona.topics import verify_topics
from esper.schemas import ids
from esper.schemas.events import PolicyActivated
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo import decisions
from esper.services.tamiyo.metrics import TamiyoMetrics
from esper.services.tamiyo.policies import EpsilonSoft, Policy
from esper.services.tamiyo.policies.baselines import RandomPolicy, SchedulePolicy, WaitPolicy
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.seen import seen_view
from esper.services.tamiyo.settings import TamiyoSettings
from esper.streams.database import connect_pool
from esper.streams.queries import queries
from esper.streams.views import (
    PendingBoundary,
    UndoneDecision,
    decisions_without_command,
    pending_boundaries,
    read_view_rows,
)

RESEND_AFTER_S = 2.0  # a command may take this long to be projected before it is sent again
RETRY_S = (0.2, 5.0)
TRANSIENT = (
    UnavailableError,
    NotAllowedError,
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # Postgres ended the connection in the moment of a question
)

_log = get_logger(__name__)


def make_policy(tamiyo: TamiyoSettings) -> Policy:
    """The policy that the settings name."""
    match tamiyo.policy:
        case "wait":
            return WaitPolicy()
        case "random":
            return RandomPolicy(tamiyo.random_wait_share)
        case "schedule":
            return SchedulePolicy(tamiyo.schedule_every_epochs)
        case _:
            return HeuristicPolicy(tamiyo.heuristic)


class DecisionService:
    """Async context manager; ``run`` until it is cancelled."""

    def __init__(self, settings: Settings, tamiyo: TamiyoSettings) -> None:
        self._settings = settings
        self._tamiyo = tamiyo
        self._policy = EpsilonSoft(make_policy(tamiyo), tamiyo.epsilon, tamiyo.rng_seed)
        self.metrics = TamiyoMetrics(tamiyo.policy, tamiyo.policy_version)
        self._exits = AsyncExitStack()
        self._first_seen: dict[UUID, float] = {}
        self._decided: set[UUID] = set()
        self._sent_at: dict[UUID, float] = {}
        self._pool: Any = None
        self._producer: Any = None

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
            await self._activate()
            _log.info("tamiyo.metrics", port=port)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def run(self) -> None:
        """Decide until cancelled; keep trying while Kafka or Postgres is away."""
        _log.info("tamiyo.ready", policy=self._tamiyo.policy, epsilon=self._tamiyo.epsilon)
        wait_s = RETRY_S[0]
        while True:
            try:
                await self.tick()
                self.metrics.looked()
                wait_s = RETRY_S[0]
                await asyncio.sleep(self._tamiyo.poll_s)
            except TRANSIENT as error:
                self.metrics.failed(error)
                _log.warning("tamiyo.waiting", error=str(error), retry_s=wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_S[1])

    async def tick(self) -> None:
        """Look once: decide what can be decided, send again what was left undone."""
        async with self._pool.acquire() as connection:
            pending = await pending_boundaries(connection)
            undone = await decisions_without_command(connection)
        waiting = [b for b in pending if b.event_id not in self._decided]
        self.metrics.found(waiting)
        for boundary in waiting:
            with traced(boundary.traceparent):
                await self._consider(boundary)
        for decision in undone:
            if time.monotonic() - self._sent_at.get(decision.event_id, -RESEND_AFTER_S) > RESEND_AFTER_S:
                with traced(decision.traceparent):
                    await self._carry_out(decision)

    async def _consider(self, pending: PendingBoundary) -> None:
        seen = self._first_seen.setdefault(pending.event_id, time.monotonic())
        if pending.is_complete:
            decision = await self._decide(pending)
        elif time.monotonic() - seen < self._tamiyo.stale_after_s:
            return
        else:
            decision = decisions.stale_decision(pending, self._tamiyo)
            await self._producer.send(decision)
        self.metrics.decided(decision, time.monotonic() - seen)
        self._decided.add(pending.event_id)
        self._first_seen.pop(pending.event_id, None)

    async def _decide(self, pending: PendingBoundary) -> OonaMessage:
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = await read_view_rows(connection, pending.run_id, pending.incarnation, pending.boundary)
        view = assemble(rows)
        chosen = self._policy.choose(view)
        decision = decisions.made_decision(view, chosen, pending, self._tamiyo)
        await self._producer.send(decisions.recorded_view(view, pending))
        await self._producer.send(decision)
        unsent = decisions.unsent_of(decision, chosen)
        if unsent is not None:
            _log.info(
                "decision.made",
                run=view.run_id,
                boundary=view.boundary,
                action=chosen.choice.action,
                seed=f"{unsent.layer_id}:{unsent.seed_id}",
                probability=round(chosen.probability, 4),
                reason=chosen.reason,
            )
            await self._send_command(unsent)
        return decision

    async def _carry_out(self, undone: UndoneDecision) -> None:
        """Send the command of a decision that was made before; it names what the decision saw."""
        view = await seen_view(self._settings.need_kafka(), undone)
        unsent = None if view is None else decisions.unsent_again(undone, view)
        if unsent is None:
            self._sent_at[undone.event_id] = math.inf  # the log will not say more of it
            _log.warning(
                "decision.without_view",
                run=undone.run_id,
                boundary=undone.boundary,
                digest=undone.view_digest,
                detail="no command is sent: the log does not hold what this decision saw",
            )
            return
        await self._send_command(unsent, is_resent=True)

    async def _send_command(self, decision: decisions.UnsentDecision, *, is_resent: bool = False) -> None:
        await self._producer.send(decisions.command_for(decision, self._tamiyo.expiry_boundaries))
        self._sent_at[decision.event_id] = time.monotonic()
        self.metrics.commanded(is_resent=is_resent)

    async def _activate(self) -> None:
        """Say which policy decides from here on, unless the log says so already."""
        parameters = self._tamiyo.heuristic.model_dump() if self._tamiyo.policy == "heuristic" else {}
        event_id = ids.request_id(f"activate:{self._tamiyo.model_dump_json()}")
        async with self._pool.acquire() as connection:
            active = await queries("views").active_policy(connection, policy_id=self._tamiyo.policy)
        if active is not None and active["policy_version"] == self._tamiyo.policy_version:
            return
        event = PolicyActivated(
            policy_id=self._tamiyo.policy,
            policy_version=self._tamiyo.policy_version,
            kind=self._policy.policy.kind,
            parameters={**parameters, "epsilon": self._tamiyo.epsilon},
            activation_id=event_id,
            reason="named by the settings when Tamiyo started",
        )
        await self._producer.send(OonaMessage.of(event, id=event_id, source=decisions.SOURCE))
