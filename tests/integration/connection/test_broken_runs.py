"""A run that cannot be decided delays no other run: it gets WAIT with the reason, on real rows and a real log."""

import asyncio
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.conditions import wait_until_async
from support.events.run_messages import read_run_messages
from support.events.tamiyo_run_events import boundary_reached, epoch_completed, run_ended, run_started
from support.processes.esper_processes import running, worker

from esper.embedded.stack import EmbeddedStack
from esper.graph.graph_view import GraphView
from esper.oona.producer import OonaProducer
from esper.schemas import ids
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import DECISIONS, VIEWS
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.decision_service import DecisionService
from esper.services.tamiyo.policies import ActionDistribution, Policy, point_mass
from esper.services.tamiyo.settings import TamiyoSettings
from esper.streams.database.connections import connect_pool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STALE_AFTER_S = 20.0
NUM_SOUND = 5


class Picky(Policy):
    """WAITs, and raises for one run."""

    kind = "picky"

    def __init__(self, hated: str) -> None:
        self._hated = hated

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        if view.run_id == self._hated:
            raise RuntimeError("not this one")
        return point_mass(0, "as always")


async def test_broken_run_delays_no_other_run(stack: EmbeddedStack, tmp_path: Path) -> None:
    name = uuid.uuid4().hex[:8]
    sound = [f"sound-{n}-{name}" for n in range(NUM_SOUND)]
    hated, broken = f"hated-{name}", f"broken-{name}"
    run_ids = [*sound, hated, broken]
    tamiyo = TamiyoSettings.model_validate({"policy": "wait", "stale_after_s": STALE_AFTER_S})
    settings = stack.settings()
    with running(worker(stack, tmp_path), "worker.ready"):
        async with (
            OonaProducer(settings.need_kafka()) as producer,
            connect_pool(settings.need_postgres()) as pool,
            DecisionService(settings, tamiyo) as service,
        ):
            service._follower.active.policy.policy = Picky(hated)
            await producer.send_batch([m for r in run_ids for m in (run_started(r), epoch_completed(r, 1))])

            async def are_there() -> bool:
                found = await pool.fetchval("SELECT count(*) FROM layers WHERE run_id = ANY($1)", run_ids)
                return bool(found == len(run_ids))

            await wait_until_async(are_there, 40, "the runs' rows")
            await pool.execute("UPDATE layers SET kind = 'no such kind' WHERE run_id = $1", broken)
            await producer.send_batch([boundary_reached(r, 2, 1) for r in run_ids])
            deciding = asyncio.create_task(service.run())
            try:

                async def decisions_of(*of: str) -> list[OonaMessage]:
                    return [d for run_id in of for d in await read_run_messages(stack, run_id, DECISIONS)]

                async def are_decided() -> bool:
                    return len(await decisions_of(*sound, hated)) == NUM_SOUND + 1

                await wait_until_async(are_decided, STALE_AFTER_S, "the others' decisions")
                assert await decisions_of(broken) == [], "it is tried again first"

                async def is_given_up() -> bool:
                    return bool(await decisions_of(broken))

                await wait_until_async(is_given_up, 3 * STALE_AFTER_S, "the broken one's WAIT")
                (given_up,), (failed,) = await decisions_of(broken), await decisions_of(hated)
                counted = service.metrics.meter.registry.get_sample_value
                assert (counted("esper_tamiyo_decision_failures_total", {"step": "view"}) or 0) > 1
                assert counted("esper_tamiyo_decision_failures_total", {"step": "policy"}) == 1
                assert service.metrics.health.problems() == [], "it is ready: the others are served"
            finally:
                deciding.cancel()
                await asyncio.wait([deciding])
                await producer.send_batch([run_ended(r, 3) for r in run_ids])
                await pool.execute("UPDATE layers SET kind = 'linear' WHERE run_id = $1", broken)
    assert (given_up.data.action, given_up.data.stale, given_up.data.view_digest) == ("wait", True, None)
    assert "cannot be made" in given_up.data.reason
    assert "no such kind" in given_up.data.reason
    assert (failed.data.action, failed.data.stale, failed.data.probability) == ("wait", False, 1.0)
    assert "RuntimeError: not this one" in failed.data.reason
    (seen,) = await read_run_messages(stack, hated, VIEWS)
    assert seen.data.digest == failed.data.view_digest, "what the policy failed on is in the log"
    for decision in await read_run_messages(stack, sound[0], DECISIONS):
        assert (decision.id, decision.data.reason) == (ids.decision_id(sound[0], 1, 1), "as always")
