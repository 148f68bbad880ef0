"""Two controllers as real processes on a real broker and Postgres. One is stopped right before it writes, then killed or
resumed late. One decision counts, the first in the log, and there are no other commands than its own."""

import itertools
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg
import pytest
from support.conditions import wait_until, wait_until_async
from support.data.certified_blueprints import certified_at_once
from support.events.run_messages import read_run_messages
from support.events.tamiyo_run_events import (
    KERNEL,
    boundary_reached,
    epoch_completed,
    first_boundary_view,
    is_kernel_offered,
    run_ended,
    run_started,
)
from support.paths import PROCESSES
from support.processes.esper_processes import SCRIPTS, log_of, process, running, worker
from support.processes.paused_tamiyo import POLL_FINISHED

from esper.connection.commands import CommandInbox, ReceivedCommand
from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.enums import Action
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import COMMANDS, DECISIONS, VIEWS
from esper.services.tamiyo.policies import EpsilonSoft
from esper.services.tamiyo.policies.baselines import RandomPolicy, SchedulePolicy

pytestmark = pytest.mark.slow

SCRIPT = PROCESSES / "paused_tamiyo.py"
RIVAL = {"ESPER_TAMIYO__POLICY": "schedule", "ESPER_TAMIYO__SCHEDULE_EVERY_EPOCHS": "1"}
VICTIM = {"ESPER_TAMIYO__POLICY": "random"}
LAYERS = ("fc1", "fc2")


class Rivals(NamedTuple):
    """A running controller, and what is needed to start another one."""

    stack: EmbeddedStack
    folder: Path
    other: ChildProcess


@pytest.fixture(scope="module")
def rivals(stack: EmbeddedStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rivals]:
    folder = tmp_path_factory.mktemp("tamiyos")
    other = process(stack, folder, "rival", str(SCRIPTS / "esper"), "serve", "tamiyo", **RIVAL)
    with running(worker(stack, folder), "worker.ready"), running(other, "tamiyo.ready"):
        yield Rivals(stack, folder, other)


@pytest.fixture
async def producer(stack: EmbeddedStack) -> AsyncIterator[OonaProducer]:
    async with OonaProducer(stack.settings().need_kafka()) as opened:
        yield opened


def run_with_rival_decisions() -> str:
    """A run id with which both policies germinate, in different layers: random draws depend on the id."""
    for n in itertools.count():
        run_id = f"rivals-{uuid.uuid4().hex[:8]}-{n}"
        view = first_boundary_view(run_id, LAYERS)
        one = EpsilonSoft(RandomPolicy(), 0.05, 0).choose(view).choice
        other = EpsilonSoft(SchedulePolicy(1), 0.05, 0).choose(view).choice
        if one.action == other.action == Action.GERMINATE and one.seed != other.seed:
            return run_id
    raise AssertionError


def is_stopped(child: ChildProcess) -> bool:
    assert child.is_alive, child.tail()
    assert child.pid is not None
    return psutil.Process(child.pid).status() == psutil.STATUS_STOPPED


async def stopped_before(rivals: Rivals, producer: OonaProducer, run_id: str, topic: str) -> ChildProcess:
    """Start a controller that stops at this topic with the first boundary, while the other one is paused."""
    rivals.other.send(signal.SIGSTOP)
    victim = process(rivals.stack, rivals.folder, f"{run_id}", sys.executable, str(SCRIPT), run_id, topic, **VICTIM)
    victim.start()
    try:
        victim.wait_until_ready(lambda: POLL_FINISHED in log_of(victim), 60)
        registered = events.KernelRegistered(blueprint_id="affine", kernel=KERNEL)
        await producer.send_batch(certified_at_once())
        await producer.send(OonaMessage.of(registered, id=ids.kernel_event_id(KERNEL.kernel_sha256), source="test"))
        await wait_until_async(lambda: is_kernel_offered(rivals.stack, KERNEL), 30, "the kernel")
        await producer.send_batch(
            [run_started(run_id, LAYERS), epoch_completed(run_id, 1), boundary_reached(run_id, 2, 1)]
        )
        wait_until(lambda: is_stopped(victim), 40, "the controller's stop")
        # when it resumes, the other one must find the decision; otherwise it may write one too
        if topic == COMMANDS.name:
            await wait_until_async(lambda: counting(rivals.stack, run_id), 30, "the decision's row")
    except BaseException:
        victim.kill()
        raise
    finally:
        rivals.other.send(signal.SIGCONT)
    return victim


async def counting(stack: EmbeddedStack, run_id: str) -> tuple[str, str] | None:
    """Policy and layer of the decision in the projections."""
    async with await psycopg.AsyncConnection.connect(stack.postgres.dsn) as connection:
        schema = stack.settings().need_postgres().schema_name
        found = await connection.execute(
            f"SELECT policy_id, layer_id FROM {schema}.decisions WHERE run_id = %s", (run_id,)
        )
        return await found.fetchone()


async def agree(stack: EmbeddedStack, run_id: str) -> dict[str, Any]:
    """Check that the first decision in the log is in the projections, has all commands, and a trainer takes one."""
    decisions = await read_run_messages(stack, run_id, DECISIONS)
    commands = await read_run_messages(stack, run_id, COMMANDS)
    first = decisions[0]
    row = await wait_until_async(lambda: counting(stack, run_id), 30, "the decision's row")
    assert row == (first.data.policy_id, first.data.layer_id)
    assert {d.id for d in decisions} == {ids.decision_id(run_id, 1, 1)}
    assert {c.id for c in commands} == {ids.command_id(first.id)}
    assert {c.data.model_dump_json() for c in commands} == {commands[0].data.model_dump_json()}
    assert (commands[0].data.layer_id, commands[0].data.seed_id) == (first.data.layer_id, first.data.seed_id)
    inbox = CommandInbox(0)
    for n, command in enumerate(commands):
        inbox.put(ReceivedCommand(command, command.data, n))
    assert len(inbox.ready(10)) == 1
    return {"policy": first.data.policy_id, "decisions": len(decisions), "commands": len(commands)}


async def is_commanded(stack: EmbeddedStack, run_id: str) -> bool:
    return bool(await read_run_messages(stack, run_id, COMMANDS))


COUNTING_POLICY = {VIEWS.name: "schedule", DECISIONS.name: "schedule", COMMANDS.name: "random"}
"""Topic at which a controller stops -> the policy whose decision counts."""


@pytest.mark.parametrize("topic", COUNTING_POLICY)
async def test_killed_controller_is_completed_by_the_other(rivals: Rivals, producer: OonaProducer, topic: str) -> None:
    run_id = run_with_rival_decisions()
    victim = await stopped_before(rivals, producer, run_id, topic)
    victim.kill()
    await wait_until_async(lambda: is_commanded(rivals.stack, run_id), 40, "the command")
    found = await agree(rivals.stack, run_id)
    assert found == {"policy": COUNTING_POLICY[topic], "decisions": 1, "commands": 1}
    await producer.send(run_ended(run_id, 3))


@pytest.mark.parametrize("topic", COUNTING_POLICY)
async def test_paused_controller_writes_late_without_effect(rivals: Rivals, producer: OonaProducer, topic: str) -> None:
    run_id = run_with_rival_decisions()
    victim = await stopped_before(rivals, producer, run_id, topic)
    try:
        await wait_until_async(lambda: is_commanded(rivals.stack, run_id), 40, "the other one's command")
        num_polls = log_of(victim).count(POLL_FINISHED)
        victim.send(signal.SIGCONT)
        wait_until(lambda: log_of(victim).count(POLL_FINISHED) > num_polls + 1, 30, "two polls of the late controller")
    finally:
        victim.kill()
    found = await agree(rivals.stack, run_id)
    is_decided_late = topic != COMMANDS.name
    assert found == {
        "policy": COUNTING_POLICY[topic],
        "decisions": 2 if is_decided_late else 1,
        "commands": 1 if is_decided_late else 2,
    }
    await producer.send(run_ended(run_id, 3))


async def test_parallel_controllers_leave_one_decision_that_counts(rivals: Rivals, producer: OonaProducer) -> None:
    """Both run, and every run reaches its next boundary as soon as the last one is decided."""
    run_ids = [run_with_rival_decisions() for _n in range(4)]
    second = process(rivals.stack, rivals.folder, "second", str(SCRIPTS / "esper"), "serve", "tamiyo", **VICTIM)
    with running(second, "tamiyo.ready"):
        await producer.send_batch([m for r in run_ids for m in (run_started(r, LAYERS), epoch_completed(r, 1))])
        for number in range(1, 9):
            await producer.send_batch([boundary_reached(r, number + 1, number) for r in run_ids])

            async def all_decided(number: int = number) -> bool:
                found = [await read_run_messages(rivals.stack, r, DECISIONS) for r in run_ids]
                return all(number in {d.data.boundary for d in of_run} for of_run in found)

            await wait_until_async(all_decided, 30, f"decisions for boundary {number}")
    for run_id in run_ids:
        first: dict[int, Any] = {}
        for decision in await read_run_messages(rivals.stack, run_id, DECISIONS):
            assert not decision.data.stale
            first.setdefault(decision.data.boundary, decision.data)
        assert sorted(first) == list(range(1, 9))
        commands = await read_run_messages(rivals.stack, run_id, COMMANDS)
        for command in (c.data for c in commands):
            counted = first[command.boundary]
            assert (command.layer_id, command.seed_id) == (counted.layer_id, counted.seed_id)
        await producer.send(run_ended(run_id, 10))
