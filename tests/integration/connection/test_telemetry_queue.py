"""Telemetry: bounded in memory and on disk, in order, and every loss told."""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.conditions import wait_until, wait_until_async
from support.events.event_examples import EXAMPLES
from support.paths import IMPORTS, PROCESSES
from support.processes.esper_processes import process
from support.processes.separate_broker import make_topics, read_all, running_broker, settings_of

from esper.config import KafkaSettings
from esper.connection.events import telemetry_queue as telemetry_module
from esper.connection.events.telemetry_queue import TelemetryQueue
from esper.connection.settings import LinkOptions
from esper.embedded.kafka import EmbeddedKafka
from esper.embedded.stack import EmbeddedStack
from esper.oona.log_reader import partition_of, read_range
from esper.oona.outbox.outbox_store import Outbox
from esper.oona.producer import OonaProducer
from esper.schemas import events
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import RUNS, TELEMETRY, TopicSpec

SCRIPT = PROCESSES / "telemetry_run.py"
NUM_LAYERS, STEPS = 2, 20
HEALTH = next(e for e in EXAMPLES if isinstance(e, events.LayerHealthMeasured))


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedKafka]:
    with running_broker() as running:
        yield running


@pytest.fixture(scope="module")
async def kafka(broker: EmbeddedKafka) -> KafkaSettings:
    await make_topics(settings_of(broker), TELEMETRY)
    return settings_of(broker)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_module, "AWAY_AFTER_S", 1.0)


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Outbox]:
    outbox = Outbox(tmp_path / "telemetry.sqlite")
    outbox.open()
    yield outbox
    outbox.close()


def health(run: str, number: int) -> OonaMessage:
    event = HEALTH.model_copy(update={"run_id": run, "sequence": number})
    return OonaMessage.of(event, id=uuid.UUID(int=number), source="test")


@asynccontextmanager
async def sending(pipe: TelemetryQueue, kafka: KafkaSettings) -> AsyncIterator[None]:
    """What the link does with a pipe, until it is closed: whatever is under way is broken off."""
    async with OonaProducer(kafka) as producer, asyncio.TaskGroup() as group:
        tasks = [group.create_task(w(producer)) for w in (pipe.keep_sending, pipe.keep_emptying_spill)]
        yield
        for task in tasks:
            task.cancel()


async def is_true(value: object) -> bool:
    return bool(value)


async def arrived(kafka: KafkaSettings, run: str) -> list[int]:
    """The sequences of a run as they lie in the log, the first of each."""
    partition = partition_of(run, TELEMETRY)
    found = [r.decode().data for r in (await read_all(kafka, TELEMETRY))[partition] if r.key == run.encode()]
    return list(dict.fromkeys(e.sequence for e in found if isinstance(e, events.LayerHealthMeasured)))


async def test_a_broker_that_is_away_fills_the_spill_in_order_and_what_is_beyond_it_is_counted(
    broker: EmbeddedKafka, kafka: KafkaSettings, spill: Outbox, run_id: str
) -> None:
    pipe = TelemetryQueue(spill, LinkOptions(max_spilled_telemetry=50))
    async with sending(pipe, kafka):
        for n in range(10):
            assert pipe.put(health(run_id, n))
        await wait_until_async(lambda: is_true(pipe.is_empty), 20, "the first ten")
        broker.pause()
        try:
            for start, end in ((10, 40), (40, 80)):
                for n in range(start, end):
                    assert pipe.put(health(run_id, n))
                await wait_until_async(lambda e=end: is_true(pipe.num_settled == e), 20, "the spill")
            assert len(spill) == 50
            assert pipe.take_lost() == 20, "exactly what did not fit"
            assert pipe.take_lost() == 0
        finally:
            broker.resume()
        await wait_until_async(lambda: is_true(pipe.is_empty), 30, "the spill to be empty")
        assert pipe.put(health(run_id, 80))
        await wait_until_async(lambda: is_true(pipe.is_empty), 20, "what comes after")
    assert await arrived(kafka, run_id) == [*range(60), 80]


async def test_what_is_under_way_at_the_end_is_kept_for_the_next_process(
    broker: EmbeddedKafka, kafka: KafkaSettings, spill: Outbox, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_module, "AWAY_AFTER_S", 30.0)
    pipe = TelemetryQueue(spill, LinkOptions())
    async with sending(pipe, kafka):
        await wait_until_async(lambda: is_true(not pipe._is_spilling), 10, "the start")
        broker.pause()
        for n in range(1_500):  # a batch, and half of one behind it
            assert pipe.put(health(run_id, n))
        await wait_until_async(lambda: is_true(len(pipe._queue) == 500), 10, "the batch under way")
        assert len(spill) == 0
    broker.resume()
    pipe.save_rest()
    assert [r.key for _id, r in spill.oldest(2_000)] == [run_id.encode()] * 1_500
    assert pipe.num_settled == 1_500
    async with sending(TelemetryQueue(spill, LinkOptions()), kafka):
        await wait_until_async(lambda: is_true(not len(spill)), 20, "the spill to be empty")
    assert await arrived(kafka, run_id) == list(range(1_500))


def test_a_full_queue_takes_nothing_and_counts_it(spill: Outbox) -> None:
    pipe = TelemetryQueue(spill, LinkOptions(max_queued_telemetry=3))
    assert [pipe.put(health("run", n)) for n in range(5)] == [True] * 3 + [False] * 2
    assert pipe.take_lost() == 2
    pipe.save_rest()
    assert len(spill) == pipe.num_settled == 3
    assert pipe.put(health("run", 5))


async def told(stack: EmbeddedStack, run_id: str, topic: TopicSpec) -> list[events.Event]:
    kafka, partition = stack.settings().need_kafka(), partition_of(run_id, topic)
    return [r.decode().data async for r in read_range(kafka, topic, partition=partition) if r.key == run_id.encode()]


@pytest.mark.timeout(360)
async def test_what_died_in_the_memory_of_a_killed_process_is_told_once(
    stack: EmbeddedStack, tmp_path: Path, run_id: str
) -> None:
    for mode in ("first", "again", "last"):
        go = tmp_path / f"go-{mode}"
        command = (sys.executable, str(SCRIPT), mode, run_id, str(tmp_path / "runs"), str(go))
        child = process(stack, tmp_path, mode, *command, PYTHONPATH=IMPORTS)
        child.start()
        await asyncio.to_thread(wait_until, lambda c=child: "connected" in c.log_path.read_text(), 90, "the link")
        try:
            if mode == "first":
                stack.kafka.pause()  # so that all of its telemetry is in memory
            go.touch()
            await asyncio.to_thread(wait_until, lambda c=child: not c.is_alive, 120, "the end of the process")
        finally:
            stack.kafka.resume()
        assert child.returncode == (0 if mode == "last" else -9), child.tail()
    gaps = [e for e in await told(stack, run_id, RUNS) if isinstance(e, events.TelemetryGap)]
    assert [(g.incarnation, g.num_lost, g.from_step, g.step) for g in gaps] == [(2, NUM_LAYERS * STEPS, 0, STEPS)]
    whole = [e for e in await told(stack, run_id, TELEMETRY) if isinstance(e, events.LayerHealthMeasured)]
    assert len({e.sequence for e in whole if e.incarnation == 3}) == NUM_LAYERS * STEPS, "all of a run that ended"
