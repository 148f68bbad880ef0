"""Telemetry: bounded in memory and on disk, in order, and every loss recorded."""

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
    monkeypatch.setattr(telemetry_module, "SEND_TIMEOUT_S", 1.0)


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
async def sending(queue: TelemetryQueue, kafka: KafkaSettings) -> AsyncIterator[None]:
    """Run the loops that send a queue; leaving cancels them with their batches in flight."""
    async with OonaProducer(kafka) as producer, asyncio.TaskGroup() as group:
        tasks = [group.create_task(w(producer)) for w in (queue.keep_sending, queue.keep_emptying_spill)]
        yield
        for task in tasks:
            task.cancel()


async def is_true(value: object) -> bool:
    return bool(value)


async def arrived(kafka: KafkaSettings, run: str) -> list[int]:
    """The sequence numbers of a run in the order of the log, without duplicates."""
    partition = partition_of(run, TELEMETRY)
    found = [r.decode().data for r in (await read_all(kafka, TELEMETRY))[partition] if r.key == run.encode()]
    return list(dict.fromkeys(e.sequence for e in found if isinstance(e, events.LayerHealthMeasured)))


async def test_queue_spills_in_order_and_counts_the_overflow(
    broker: EmbeddedKafka, kafka: KafkaSettings, spill: Outbox, run_id: str
) -> None:
    queue = TelemetryQueue(spill, LinkOptions(max_spilled_telemetry=50))
    async with sending(queue, kafka):
        for n in range(10):
            assert queue.put(health(run_id, n))
        await wait_until_async(lambda: is_true(queue.is_empty), 20, "the first ten")
        broker.pause()
        try:
            for start, end in ((10, 40), (40, 80)):
                for n in range(start, end):
                    assert queue.put(health(run_id, n))
                await wait_until_async(lambda e=end: is_true(queue.num_settled == e), 20, "the spill")
            assert len(spill) == 50
            assert queue.take_lost() == 20, "exactly the records that did not fit"
            assert queue.take_lost() == 0
        finally:
            broker.resume()
        await wait_until_async(lambda: is_true(queue.is_empty), 30, "the spill to be empty")
        assert queue.put(health(run_id, 80))
        await wait_until_async(lambda: is_true(queue.is_empty), 20, "what comes after")
    assert await arrived(kafka, run_id) == [*range(60), 80]


async def test_queue_saves_the_batch_in_flight(
    broker: EmbeddedKafka, kafka: KafkaSettings, spill: Outbox, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_module, "SEND_TIMEOUT_S", 30.0)
    queue = TelemetryQueue(spill, LinkOptions())
    async with sending(queue, kafka):
        await wait_until_async(lambda: is_true(not queue._is_spilling), 10, "the start")
        broker.pause()
        for n in range(1_500):  # a batch, and half of one behind it
            assert queue.put(health(run_id, n))
        await wait_until_async(lambda: is_true(len(queue._queue) == 500), 10, "the batch in flight")
        assert len(spill) == 0
    broker.resume()
    queue.save_rest()
    assert [r.key for _id, r in spill.oldest(2_000)] == [run_id.encode()] * 1_500
    assert queue.num_settled == 1_500
    async with sending(TelemetryQueue(spill, LinkOptions()), kafka):
        await wait_until_async(lambda: is_true(not len(spill)), 20, "the spill to be empty")
    assert await arrived(kafka, run_id) == list(range(1_500))


def test_full_queue_drops_and_counts(spill: Outbox) -> None:
    queue = TelemetryQueue(spill, LinkOptions(max_queued_telemetry=3))
    assert [queue.put(health("run", n)) for n in range(5)] == [True] * 3 + [False] * 2
    assert queue.take_lost() == 2
    queue.save_rest()
    assert len(spill) == queue.num_settled == 3
    assert queue.put(health("run", 5))


async def events_of(stack: EmbeddedStack, run_id: str, topic: TopicSpec) -> list[events.Event]:
    kafka, partition = stack.settings().need_kafka(), partition_of(run_id, topic)
    return [r.decode().data async for r in read_range(kafka, topic, partition=partition) if r.key == run_id.encode()]


@pytest.mark.timeout(360)
async def test_telemetry_lost_by_a_crash_is_recorded_once(stack: EmbeddedStack, tmp_path: Path, run_id: str) -> None:
    for mode in ("first", "again", "last"):
        go = tmp_path / f"go-{mode}"
        command = (sys.executable, str(SCRIPT), mode, run_id, str(tmp_path / "runs"), str(go))
        child = process(stack, tmp_path, mode, *command, PYTHONPATH=IMPORTS)
        child.start()
        await asyncio.to_thread(wait_until, lambda c=child: "connected" in c.log_path.read_text(), 90, "the link")
        try:
            if mode == "first":
                stack.kafka.pause()  # all of its telemetry stays in memory
            go.touch()
            await asyncio.to_thread(wait_until, lambda c=child: not c.is_alive, 120, "the end of the process")
        finally:
            stack.kafka.resume()
        assert child.returncode == (0 if mode == "last" else -9), child.tail()
    gaps = [e for e in await events_of(stack, run_id, RUNS) if isinstance(e, events.TelemetryGap)]
    assert [(g.incarnation, g.num_lost, g.from_step, g.step) for g in gaps] == [(2, NUM_LAYERS * STEPS, 0, STEPS)]
    whole = [e for e in await events_of(stack, run_id, TELEMETRY) if isinstance(e, events.LayerHealthMeasured)]
    assert len({e.sequence for e in whole if e.incarnation == 3}) == NUM_LAYERS * STEPS, (
        "every event of an incarnation that ended normally"
    )
