"""GroupConsumer on a real broker: commits after the handler, loses nothing, and reports when it makes no progress."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiokafka
import pytest
from aiokafka.admin import RecordsToDelete
from support.conditions import wait_until_async
from support.processes.separate_broker import make_topics, numbered, running_broker, settings_of

from esper.config import KafkaSettings
from esper.embedded.kafka import EmbeddedKafka
from esper.errors import ConflictError
from esper.oona.admin.topics import admin_client, apply_topics
from esper.oona.consumer import group_consumer as consumer_module
from esper.oona.consumer.group_consumer import LEAVE_TIMEOUT_S, GroupConsumer, GroupConsumerOptions
from esper.oona.consumer.partition_reader import EventBatch
from esper.oona.dead_letters.dead_letter import read_dead_letter
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.oona.progress_watch import Stall
from esper.oona.records import Record, TopicPartition
from esper.schemas.topics import (
    BLUEPRINTS,
    COMMANDS,
    DECISIONS,
    FIELD_REPORTS,
    LIFECYCLE,
    POLICIES,
    REDRIVES,
    RUNS,
    TELEMETRY,
    VIEWS,
    TopicSpec,
)

OPTIONS = GroupConsumerOptions(max_batch_records=10, finish_s=5, session_timeout_s=6)
FETCH_BYTES = 1024 * 1024  # the most that the broker returns of a partition at once


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedKafka]:
    with running_broker() as running:
        yield running


@pytest.fixture
async def kafka(broker: EmbeddedKafka) -> KafkaSettings:
    await apply_topics(settings_of(broker))
    return settings_of(broker)


class Recorder:
    """A handler that records its batches, after an action of the test."""

    def __init__(self, before: Callable[[EventBatch], Any] | None = None) -> None:
        self.batches: list[EventBatch] = []
        self._before = before

    async def __call__(self, batch: EventBatch) -> None:
        if self._before is not None:
            await self._before(batch)
        self.batches.append(batch)

    def numbers(self, partition: int = 0) -> list[int]:
        return [r.message.id.int for b in self.batches if b.partition == partition for r in b.events]


@asynccontextmanager
async def reading(
    kafka: KafkaSettings,
    topic: TopicSpec,
    handler: Any,
    group: str = "",
    options: GroupConsumerOptions = OPTIONS,
    **more: Any,
) -> Any:
    """A consumer that runs in the background. Every test uses another topic."""
    async with GroupConsumer(kafka, group or f"g-{topic.name}", [topic], handler, options=options, **more) as consumer:
        running = asyncio.create_task(consumer.run())
        try:
            yield consumer
        finally:
            consumer.stop()
            await running


async def write(kafka: KafkaSettings, records: Sequence[Record]) -> None:
    async with OonaProducer(kafka) as producer:
        await producer.send_records(records)


async def committed(kafka: KafkaSettings, topic: TopicSpec) -> dict[int, int]:
    async with admin_client(kafka) as client:
        offsets = await client.list_consumer_group_offsets(f"g-{topic.name}")
    return {tp.partition: found.offset for tp, found in offsets.items() if found.offset >= 0}


async def until(condition: Callable[[], Any], what: str, deadline_s: float = 30.0) -> Any:
    async def is_so() -> Any:
        return condition()

    return await wait_until_async(is_so, deadline_s, what)


async def delete_before(kafka: KafkaSettings, topic: TopicSpec, offset: int) -> None:
    """Delete records as retention does."""
    async with admin_client(kafka) as client:
        await client.delete_records({aiokafka.TopicPartition(topic.name, 0): RecordsToDelete(before_offset=offset)})


async def test_consumer_commits_after_the_handler_returns(kafka: KafkaSettings) -> None:
    tries: list[tuple[int, int]] = []
    is_fixed = False

    async def fail(batch: EventBatch) -> None:
        if batch.partition == 0 and not is_fixed:
            tries.append((batch.start, batch.end))
            raise RuntimeError("a bug")

    handler = Recorder(fail)
    await write(kafka, [numbered(RUNS, n, n % 2) for n in range(40)])
    async with reading(kafka, RUNS, handler) as consumer:
        await until(lambda: len(tries) >= 3, "three tries")
        await until(lambda: handler.numbers(1) == list(range(1, 40, 2)), "the other partition")
        await wait_until_async(lambda: _is(committed(kafka, RUNS), {1: 20}), 10, "its commit, and no other")
        assert consumer.is_healthy, "not yet a stall"
        is_fixed = True
        await until(lambda: handler.numbers() == list(range(0, 40, 2)), "the batch that failed")
    assert len(set(tries)) == 1, "the same batch"
    assert await committed(kafka, RUNS) == {0: 20, 1: 20}


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)


async def test_consumer_pauses_fetching_for_a_slow_handler(kafka: KafkaSettings) -> None:
    gate, total = asyncio.Event(), 12_000

    async def wait(_batch: EventBatch) -> None:
        await gate.wait()

    handler = Recorder(wait)
    records = [numbered(LIFECYCLE, n) for n in range(total)]
    await write(kafka, records)
    options = GroupConsumerOptions(max_batch_records=100, finish_s=5, session_timeout_s=6)
    async with reading(kafka, LIFECYCLE, handler, options=options) as consumer:
        tp = aiokafka.TopicPartition(LIFECYCLE.name, 0)
        await until(lambda: tp in consumer._readers and tp in consumer._consumer.paused(), "the pause")
        held = len(consumer._readers[tp]._buffer)
        assert 300 <= held <= 300 + FETCH_BYTES // records[0].size_bytes + 1
        gate.set()
        await until(lambda: len(handler.numbers()) == total, "the rest")
    assert handler.numbers() == list(range(total))
    assert max(len(b.events) for b in handler.batches) == 100


def poison(topic: TopicSpec, partition: int = 0) -> Record:
    return numbered(topic, 99, partition)._replace(value=b"\x00 no json")


def newer(topic: TopicSpec, partition: int = 0) -> Record:
    record = numbered(topic, 99, partition)
    headers = tuple((n, t.replace(b".v1", b".v7") if n == "ce_type" and t else t) for n, t in record.headers)
    return record._replace(headers=headers)


async def test_consumer_sends_undecodable_records_to_dead_letters(kafka: KafkaSettings) -> None:
    broken, handler = poison(DECISIONS), Recorder()
    async with OonaProducer(kafka) as producer:
        await producer.send_records([numbered(DECISIONS, 0), broken, numbered(DECISIONS, 1), poison(DECISIONS, 1)])
        async with reading(kafka, DECISIONS, handler, dead_letters=producer.send_records):
            await wait_until_async(lambda: _is(committed(kafka, DECISIONS), {0: 3, 1: 1}), 20, "the commits")
    assert handler.numbers() == [0, 1]
    dead_letters = [read_dead_letter(r) async for r in read_range(kafka, DECISIONS.dead_letters)]
    assert sorted(x.origin[1:] for x in dead_letters) == [(0, 1), (1, 0)]
    (mine,) = [x for x in dead_letters if x.origin.partition == 0]
    assert mine.record[1:4] == (broken.key, broken.value, broken.headers), "byte for byte"


@pytest.mark.parametrize(
    ("topic", "bad", "reason"), [(VIEWS, poison, "bad_json"), (COMMANDS, newer, "newer")], ids=["broken", "newer"]
)
async def test_consumer_stops_only_the_partition_it_cannot_decode(
    kafka: KafkaSettings, topic: TopicSpec, bad: Callable[[TopicSpec], Record], reason: str
) -> None:
    handler = Recorder()
    sent: list[Record] = []

    async def keep(records: Sequence[Record]) -> None:
        sent.extend(records)

    await write(kafka, [numbered(topic, 0), bad(topic), numbered(topic, 1), numbered(topic, 2, 1)])
    async with reading(kafka, topic, handler, dead_letters=keep if bad is newer else None) as consumer:
        await until(lambda: handler.numbers(1) == [2] and not consumer.is_healthy, "the stop, and the others")
        (stall,) = consumer.stalls()
        assert (stall.topic, stall.partition, stall.offset, stall.lag) == (topic.name, 0, 1, 2)
        assert reason in stall.reason
        await write(kafka, [numbered(topic, 3), numbered(topic, 4, 1)])
        await until(lambda: handler.numbers(1) == [2, 4], "later events of the other partition")
    assert handler.numbers() == [0]
    assert sent == [], "a newer version is no dead letter"
    assert await committed(kafka, topic) == {0: 1, 1: 2}


async def stop_of(consumer: GroupConsumer) -> Stall:
    """The only stall, once it is reported."""
    await until(lambda: not consumer.is_healthy, "the stop")
    (stall,) = consumer.stalls()
    return stall


async def test_consumer_stops_at_records_that_expired_unread(kafka: KafkaSettings) -> None:
    gate, blob = asyncio.Event(), (("x", b"x" * 50_000),)
    records = [numbered(FIELD_REPORTS, n) for n in range(100)]
    await write(kafka, [r._replace(headers=r.headers + blob) for r in records])

    async def wait(_batch: EventBatch) -> None:
        await gate.wait()

    handler = Recorder(wait)
    async with reading(kafka, FIELD_REPORTS, handler) as consumer:  # while the consumer reads
        tp = aiokafka.TopicPartition(FIELD_REPORTS.name, 0)
        await until(lambda: tp in consumer._readers and tp in consumer._consumer.paused(), "the pause")
        await delete_before(kafka, FIELD_REPORTS, 90)
        gate.set()
        stall = await stop_of(consumer)
    seen = len(handler.numbers())
    assert handler.numbers() == list(range(seen))
    assert stall.reason == f"offsets {seen} to 89 expired before they were read and are lost"
    assert await committed(kafka, FIELD_REPORTS) == {0: seen}
    async with reading(kafka, FIELD_REPORTS, handler) as consumer:  # and when it starts
        stall = await stop_of(consumer)
        assert (stall.offset, stall.reason) == (
            seen,
            f"offsets {seen} to 89 expired before they were read and are lost",
        )
    assert len(handler.numbers()) == seen


class Ledger(Recorder):
    """A handler that stores its positions, as a projection does; a batch that starts elsewhere is a conflict."""

    def __init__(self, before: Callable[[EventBatch], Any] | None = None) -> None:
        super().__init__(before)
        self.positions: dict[TopicPartition, int] = {}

    async def load(self, places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return {p: self.positions[p] for p in places if p in self.positions}

    async def __call__(self, batch: EventBatch) -> None:
        await super().__call__(batch)
        place = (batch.topic, batch.partition)
        if self.positions.get(place, 0) != batch.start:
            self.batches.pop()
            raise ConflictError("another member was first")
        self.positions[place] = batch.end


async def test_consumer_stops_at_a_log_shorter_than_its_position(kafka: KafkaSettings) -> None:
    ledger = Ledger()
    ledger.positions = {(BLUEPRINTS.name, 0): 7}
    await write(kafka, [numbered(BLUEPRINTS, n) for n in range(3)])
    async with reading(kafka, BLUEPRINTS, ledger, load_positions=ledger.load) as consumer:
        stall = await stop_of(consumer)
        assert (
            stall.reason == "the log ends at 3, before the position 7: the broker was wiped, or this is the wrong one"
        )
    assert ledger.batches == []


async def test_consumer_stops_at_a_recreated_topic(kafka: KafkaSettings) -> None:
    ledger = Ledger()
    await write(kafka, [numbered(POLICIES, n) for n in range(10)])
    async with reading(kafka, POLICIES, ledger, load_positions=ledger.load) as consumer:
        await until(lambda: len(ledger.numbers()) == 10, "the old log")
        async with admin_client(kafka) as client:
            await client.delete_topics([POLICIES.name])
        await asyncio.wait_for(_recreated(kafka, POLICIES), 20)
        await write(kafka, [numbered(POLICIES, n) for n in range(20, 24)])
        stall = await stop_of(consumer)
        assert "wiped" in stall.reason
    assert ledger.numbers() == list(range(10)), "nothing of the new log, which has other records at these offsets"


async def _recreated(kafka: KafkaSettings, topic: TopicSpec) -> None:
    async def is_made() -> bool:
        try:
            await make_topics(kafka, topic)
        except AssertionError:  # its deletion is not complete yet
            return False
        return True

    await wait_until_async(is_made, 20, "the topic")


async def test_consumers_handle_each_event_once_through_rebalances(kafka: KafkaSettings) -> None:
    total = 12_000
    await write(kafka, [numbered(TELEMETRY, n, n % 12) for n in range(total)])

    async def work(_batch: EventBatch) -> None:
        await asyncio.sleep(0.1)

    first, second = Ledger(work), Ledger(work)
    second.positions = first.positions  # one database
    async with reading(kafka, TELEMETRY, first, load_positions=first.load):
        await until(lambda: len(first.batches) > 12, "the first alone")
        async with reading(kafka, TELEMETRY, second, load_positions=second.load):
            await until(lambda: len(second.batches) > 12, "the second in addition")
        await until(lambda: sum(first.positions.values()) == total, "the rest, by the first alone", 90.0)
    found = defaultdict(list)
    for batch in first.batches + second.batches:
        found[batch.partition].append((batch.start, [r.message.id.int for r in batch.events]))
    for partition in range(12):
        handled = [n for _start, numbers in sorted(found[partition]) for n in numbers]
        assert handled == list(range(partition, total, 12)), "each once, in order"


async def test_consumer_stop_cancels_a_hanging_handler(kafka: KafkaSettings) -> None:
    is_hanging = asyncio.Event()

    async def hang(_batch: EventBatch) -> None:
        is_hanging.set()
        await asyncio.Event().wait()

    await write(kafka, [numbered(REDRIVES, n) for n in range(3)])
    options = GroupConsumerOptions(finish_s=0.5, session_timeout_s=6)
    async with reading(kafka, REDRIVES, Recorder(hang), options=options) as consumer:
        await is_hanging.wait()
        began = time.monotonic()
        consumer.stop()
    assert time.monotonic() - began < options.finish_s + LEAVE_TIMEOUT_S
    assert await committed(kafka, REDRIVES) == {}


async def test_consumer_reports_a_silent_broker_as_a_stall(
    broker: EmbeddedKafka, kafka: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "END_MAX_AGE_S", 1.0)
    topic, handler = RUNS.dead_letters, Recorder()
    options = GroupConsumerOptions(stalled_after_s=1.0, session_timeout_s=30)
    async with reading(kafka, topic, handler, options=options) as consumer:
        await until(lambda: len(consumer._readers) == topic.num_partitions and consumer.is_healthy, "all partitions")
        broker.pause()
        try:
            await until(lambda: not consumer.is_healthy, "the stall", 15)
            assert "no broker answers" in str(consumer.stalls()[0])
            assert "an unknown lag" in str(consumer.stalls()[0])
        finally:
            broker.resume()
        await until(lambda: consumer.is_healthy, "its end", 15)


async def test_consumer_reports_a_missing_assignment_as_a_stall(kafka: KafkaSettings) -> None:
    never_joined = GroupConsumer(kafka, "g", [RUNS], Recorder(), options=GroupConsumerOptions(stalled_after_s=0.2))
    assert never_joined.is_healthy
    assert (await stop_of(never_joined)).reason == "the group has assigned no partition to this member"
