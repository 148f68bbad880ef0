"""Automatic rollback on real Kafka and Postgres: a version whose forks show that it does harm is rolled back."""

import asyncio
import uuid
from pathlib import Path

import pytest
from support.conditions import wait_until_async
from support.data.rebuild_runs import esper
from support.events.tamiyo_run_events import boundary_reached, epoch_completed, run_started, trainer_message
from support.processes.esper_processes import WORKER, process, running

from esper.config import Settings
from esper.embedded.stack import EmbeddedStack
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.enums import Action
from esper.schemas.events.seeds import ForkedPair
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import POLICIES
from esper.services.tamiyo.decision_service import DecisionService
from esper.services.tamiyo.settings import TamiyoSettings
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.policy_versions import active_policy, forked_decisions

pytestmark = pytest.mark.slow
NUM_RUNS = 12
FORK = ForkedPair(horizon_steps=10, num_draws=1, num_parameters_host=600, flops_added=10, flops_host=1_000)


def activated(policy: str) -> OonaMessage:
    event = events.PolicyActivated(
        policy_id=policy, policy_version=1, kind=policy, activation_id=uuid.uuid4(), reason="test"
    )
    return OonaMessage.of(event, id=event.activation_id, source="test")


def harmful_run(run_id: str, number: int) -> list[OonaMessage]:
    """A run in which the schedule germinated one seed, and the branch without it was better."""
    decision_id = ids.decision_id(run_id, 1, 1)
    decision = events.DecisionMade(
        run_id=run_id, incarnation=1, boundary=1, step=10, action=Action.GERMINATE, layer_id="fc1", seed_id=0,
        blueprint_id="affine", probability=0.5, policy_id="schedule", policy_version=1, reason="due",
        view_digest="ab" * 32,
    )  # fmt: skip
    report = trainer_message(
        run_id, 3, events.FieldReported, step=20, layer_id="fc1", seed_id=0, blueprint_id="affine", outcome="fossilized",
        decision_id=decision_id, command_id=ids.command_id(decision_id), method="fork", metric="val_accuracy",
        before=0.9, after=0.8 - number / 1_000, germinated_at_step=10, num_parameters=46, fork=FORK,
    )  # fmt: skip
    messages = [run_started(run_id), epoch_completed(run_id, 1), boundary_reached(run_id, 2, 1)]
    return [*messages, OonaMessage.of(decision, id=decision_id, source="test"), report]


@pytest.mark.timeout(240)
async def test_harmful_version_is_rolled_back_once(mine: Settings, log: EmbeddedStack, tmp_path: Path) -> None:
    async with OonaProducer(mine.need_kafka()) as producer:
        for message in (activated("heuristic"), activated("schedule")):
            await producer.send(message)
        for number in range(NUM_RUNS):
            await producer.send_batch(harmful_run(f"harmed-{number}", number))
    dsn = mine.need_postgres().dsn.get_secret_value()
    worker = process(log, tmp_path, "worker", *WORKER, ESPER_POSTGRES__DSN=dsn)
    with running(worker, "worker.ready"):
        async with connect_pool(mine.need_postgres()) as pool, pool.acquire() as connection:

            async def all_are_projected() -> bool:
                active = await active_policy(connection)
                return active is not None and len(await forked_decisions(connection, active)) == NUM_RUNS

            await wait_until_async(all_are_projected, 40, "the forks' rows")
            tamiyo = TamiyoSettings.model_validate({"policy": "active", "rollback": {"interval_s": 0.2}})
            async with DecisionService(mine, tamiyo) as one, DecisionService(mine, tamiyo) as other:
                deciding = [asyncio.create_task(service.run()) for service in (one, other)]

                async def is_rolled_back() -> bool:
                    active = await active_policy(connection)
                    return active is not None and active.version.policy_id == "heuristic"

                await wait_until_async(is_rolled_back, 40, "the rollback's row")
                for task in deciding:
                    task.cancel()
            active = await active_policy(connection)
        assert active is not None
        assert active.reason.startswith("automatic rollback: over 12 runs")
        assert active.rolled_back_from == ("schedule", 1)
    records = [r.decode() async for r in read_range(mine.need_kafka(), POLICIES)]
    assert len({m.id for m in records if isinstance(m.data, events.PolicyRolledBack)}) == 1
    code, printed = await esper(mine, "projections", "verify", "--quiet")
    assert code == 0, printed
