"""The consumer on a real broker: commits after the handler, loses nothing, and says when it does not get on."""

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
FETCH_BYTES = 1024 * 1024  # what the broker gives of a partition at once


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedKafka]:
    with running_broker() as running:
        yield running


@pytest.fixture
async def kafka(broker: EmbeddedKafka) -> KafkaSettings:
    await apply_topics(settings_of(broker))
    return settings_of(broker)


class Recorder:
    """A handler that remembers what it was given, and does first what the test wants of it."""

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
    """A consumer that reads in the background. Every test has a topic of its own."""
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
    """What retention does, at once."""
    async with admin_client(kafka) as client:
        await client.delete_records({aiokafka.TopicPartition(topic.name, 0): RecordsToDelete(before_offset=offset)})


async def test_a_batch_is_committed_after_its_handler_and_comes_again_when_that_fails(kafka: KafkaSettings) -> None:
    tries: list[tuple[int, int]] = []
    is_mended = False

    async def fail(batch: EventBatch) -> None:
        if batch.partition == 0 and not is_mended:
            tries.append((batch.start, batch.end))
            raise RuntimeError("a bug")

    handler = Recorder(fail)
    await write(kafka, [numbered(RUNS, n, n % 2) for n in range(40)])
    async with reading(kafka, RUNS, handler) as consumer:
        await until(lambda: len(tries) >= 3, "three tries")
        await until(lambda: handler.numbers(1) == list(range(1, 40, 2)), "the other partition")
        await wait_until_async(lambda: _is(committed(kafka, RUNS), {1: 20}), 10, "its commit, and no other")
        assert consumer.is_healthy, "not yet a stall"
        is_mended = True
        await until(lambda: handler.numbers() == list(range(0, 40, 2)), "what had failed")
    assert len(set(tries)) == 1, "the same batch"
    assert await committed(kafka, RUNS) == {0: 20, 1: 20}


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)


async def test_a_slow_handler_holds_fetching_up_and_loses_nothing(kafka: KafkaSettings) -> None:
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


async def test_what_cannot_be_decoded_goes_to_the_dead_letters_and_holds_nothing_up(kafka: KafkaSettings) -> None:
    broken, handler = poison(DECISIONS), Recorder()
    async with OonaProducer(kafka) as producer:
        await producer.send_records([numbered(DECISIONS, 0), broken, numbered(DECISIONS, 1), poison(DECISIONS, 1)])
        async with reading(kafka, DECISIONS, handler, dead_letters=producer.send_records):
            await wait_until_async(lambda: _is(committed(kafka, DECISIONS), {0: 3, 1: 1}), 20, "the commits")
    assert handler.numbers() == [0, 1]
    letters = [read_dead_letter(r) async for r in read_range(kafka, DECISIONS.dead_letters)]
    assert sorted(x.origin[1:] for x in letters) == [(0, 1), (1, 0)]
    (mine,) = [x for x in letters if x.origin.partition == 0]
    assert mine.record[1:4] == (broken.key, broken.value, broken.headers), "byte for byte"


@pytest.mark.parametrize(
    ("topic", "bad", "reason"), [(VIEWS, poison, "bad_json"), (COMMANDS, newer, "newer")], ids=["broken", "newer"]
)
async def test_what_must_not_be_passed_over_stops_its_partition_alone(
    kafka: KafkaSettings, topic: TopicSpec, bad: Callable[[TopicSpec], Record], reason: str
) -> None:
    handler = Recorder()
    letters: list[Record] = []

    async def keep(records: Sequence[Record]) -> None:
        letters.extend(records)

    await write(kafka, [numbered(topic, 0), bad(topic), numbered(topic, 1), numbered(topic, 2, 1)])
    async with reading(kafka, topic, handler, dead_letters=keep if bad is newer else None) as consumer:
        await until(lambda: handler.numbers(1) == [2] and not consumer.is_healthy, "the stop, and the others")
        (stall,) = consumer.stalls()
        assert (stall.topic, stall.partition, stall.offset, stall.lag) == (topic.name, 0, 1, 2)
        assert reason in stall.reason
        await write(kafka, [numbered(topic, 3), numbered(topic, 4, 1)])
        await until(lambda: handler.numbers(1) == [2, 4], "what comes later elsewhere")
    assert handler.numbers() == [0]
    assert letters == [], "a newer version is upgraded to, never put away"
    assert await committed(kafka, topic) == {0: 1, 1: 2}


async def stop_of(consumer: GroupConsumer) -> Stall:
    """The one stall, once it is there."""
    await until(lambda: not consumer.is_healthy, "the stop")
    (stall,) = consumer.stalls()
    return stall


async def test_records_that_expired_unread_stop_the_partition_with_the_lost_range(kafka: KafkaSettings) -> None:
    gate, blob = asyncio.Event(), (("x", b"x" * 50_000),)
    records = [numbered(FIELD_REPORTS, n) for n in range(100)]
    await write(kafka, [r._replace(headers=r.headers + blob) for r in records])

    async def wait(_batch: EventBatch) -> None:
        await gate.wait()

    handler = Recorder(wait)
    async with reading(kafka, FIELD_REPORTS, handler) as consumer:  # under the eyes of a living reader
        tp = aiokafka.TopicPartition(FIELD_REPORTS.name, 0)
        await until(lambda: tp in consumer._readers and tp in consumer._consumer.paused(), "the pause")
        await delete_before(kafka, FIELD_REPORTS, 90)
        gate.set()
        stall = await stop_of(consumer)
    seen = len(handler.numbers())
    assert handler.numbers() == list(range(seen))
    assert stall.reason == f"offsets {seen} to 89 expired before they were read and are lost"
    assert await committed(kafka, FIELD_REPORTS) == {0: seen}
    async with reading(kafka, FIELD_REPORTS, handler) as consumer:  # and at the start
        stall = await stop_of(consumer)
        assert (stall.offset, stall.reason) == (
            seen,
            f"offsets {seen} to 89 expired before they were read and are lost",
        )
    assert len(handler.numbers()) == seen


class Ledger(Recorder):
    """A handler that keeps its own positions, as a projection does: a batch from elsewhere is a conflict."""

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
            raise ConflictError("somebody else was first")
        self.positions[place] = batch.end


async def test_a_log_that_ends_before_the_position_is_a_wiped_broker(kafka: KafkaSettings) -> None:
    ledger = Ledger()
    ledger.positions = {(BLUEPRINTS.name, 0): 7}
    await write(kafka, [numbered(BLUEPRINTS, n) for n in range(3)])
    async with reading(kafka, BLUEPRINTS, ledger, load_positions=ledger.load) as consumer:
        stall = await stop_of(consumer)
        assert (
            stall.reason == "the log ends at 3, before the position 7: the broker was wiped, or this is the wrong one"
        )
    assert ledger.batches == []


async def test_a_topic_that_is_made_anew_under_a_living_reader_stops_it(kafka: KafkaSettings) -> None:
    ledger = Ledger()
    await write(kafka, [numbered(POLICIES, n) for n in range(10)])
    async with reading(kafka, POLICIES, ledger, load_positions=ledger.load) as consumer:
        await until(lambda: len(ledger.numbers()) == 10, "the old log")
        async with admin_client(kafka) as client:
            await client.delete_topics([POLICIES.name])
        await asyncio.wait_for(_made_again(kafka, POLICIES), 20)
        await write(kafka, [numbered(POLICIES, n) for n in range(20, 24)])
        stall = await stop_of(consumer)
        assert "wiped" in stall.reason
    assert ledger.numbers() == list(range(10)), "nothing of the new log, which has other things at these offsets"


async def _made_again(kafka: KafkaSettings, topic: TopicSpec) -> None:
    async def is_made() -> bool:
        try:
            await make_topics(kafka, topic)
        except AssertionError:  # its deletion is not through yet
            return False
        return True

    await wait_until_async(is_made, 20, "the topic")


async def test_members_that_come_and_go_share_the_work_and_nothing_is_handled_twice(kafka: KafkaSettings) -> None:
    total = 12_000
    await write(kafka, [numbered(TELEMETRY, n, n % 12) for n in range(total)])

    async def work(_batch: EventBatch) -> None:
        await asyncio.sleep(0.1)

    first, second = Ledger(work), Ledger(work)
    second.positions = first.positions  # one database
    async with reading(kafka, TELEMETRY, first, load_positions=first.load):
        await until(lambda: len(first.batches) > 12, "the first alone")
        async with reading(kafka, TELEMETRY, second, load_positions=second.load):
            await until(lambda: len(second.batches) > 12, "the second beside it")
        await until(lambda: sum(first.positions.values()) == total, "the rest by the first", 90.0)
    found = defaultdict(list)
    for batch in first.batches + second.batches:
        found[batch.partition].append((batch.start, [r.message.id.int for r in batch.events]))
    for partition in range(12):
        handled = [n for _start, numbers in sorted(found[partition]) for n in numbers]
        assert handled == list(range(partition, total, 12)), "each once, in order"


async def test_stop_does_not_wait_for_a_handler_that_hangs(kafka: KafkaSettings) -> None:
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


async def test_a_broker_that_is_away_is_a_stall_and_its_return_is_the_end_of_it(
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


async def test_a_group_that_assigns_nothing_is_a_stall(kafka: KafkaSettings) -> None:
    never_joined = GroupConsumer(kafka, "g", [RUNS], Recorder(), options=GroupConsumerOptions(stalled_after_s=0.2))
    assert never_joined.is_healthy
    assert (await stop_of(never_joined)).reason == "the group has assigned no partition to this member"
