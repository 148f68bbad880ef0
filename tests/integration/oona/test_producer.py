"""The producer on a real broker: a result for every record, and order, whatever happens to the broker."""

import asyncio
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conditions import wait_until_async
from support.processes.separate_broker import make_topics, new_topic, read_all, running_broker, settings_of

from esper.config import KafkaSettings
from esper.embedded.kafka import EmbeddedKafka
from esper.errors import ContractError, InvariantError, UnavailableError
from esper.oona.producer import OonaProducer
from esper.oona.records import RECORD_LIMIT_BYTES, Position, Record, TopicPartition
from esper.oona.renewable_producer import BATCH_BYTES
from esper.schemas.topics import TELEMETRY, TopicSpec

MIB = 1024 * 1024
SIZES = st.sampled_from([0, 1, 30, 900, 40_000, BATCH_BYTES - 70, BATCH_BYTES, BATCH_BYTES + 1, 3 * BATCH_BYTES])
VALUES = st.none() | st.builds(lambda size, byte: bytes([byte]) * size, SIZES, st.integers(0, 255))
HEADERS = st.lists(st.tuples(st.text(max_size=8), st.none() | st.binary(max_size=9)), max_size=3).map(tuple)
LOTS = st.lists(
    st.tuples(
        st.integers(0, 2), st.none() | st.binary(max_size=8), VALUES, HEADERS, st.none() | st.integers(0, 2),
        st.sampled_from([1, 1, 20]),
    ),
    min_size=1, max_size=25,
)  # fmt: skip


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedKafka]:
    with running_broker() as running:
        yield running


@pytest.fixture
def kafka(broker: EmbeddedKafka) -> KafkaSettings:
    return settings_of(broker)


def record(topic: TopicSpec, number: int, size: int = 20) -> Record:
    """A record with its number as value; three partitions in turn."""
    return Record(topic.name, b"k", str(number).encode().ljust(size), (), 0, number % topic.num_partitions)


async def numbers(kafka: KafkaSettings, topic: TopicSpec) -> dict[int, list[int]]:
    """The numbers in each partition, in order."""
    return {p: [int(r.value or b"") for r in records] for p, records in (await read_all(kafka, topic)).items()}


async def test_producer_delivers_records_unchanged_and_in_order(broker: EmbeddedKafka) -> None:
    kafka = settings_of(broker)
    first, second = await new_topic(kafka), await new_topic(kafka, 1)
    await make_topics(kafka, TELEMETRY)
    topics = (first, second, TELEMETRY)  # telemetry has its own connection
    written: dict[TopicPartition, list[Record]] = {}
    async with OonaProducer(kafka) as producer:

        async def check(lots: list[tuple[int, bytes | None, bytes | None, tuple[()], int | None, int]]) -> None:
            records = [
                Record(
                    topics[t].name, key, value, headers, 1, None if part is None else part % topics[t].num_partitions
                )
                for t, key, value, headers, part, count in lots
                for _n in range(count if len(value or b"") < BATCH_BYTES else 1)
            ]
            deliveries = await producer.deliver(records)
            assert deliveries.errors == []
            for sent, position in zip(records, deliveries.positions(), strict=True):
                assert sent.partition in (None, position.partition)
                before = written.setdefault((position.topic, position.partition), [])
                assert position == Position(sent.topic, position.partition, len(before)), "no gap, no overtaking"
                before.append(sent)

        loop = asyncio.get_running_loop()

        @settings(max_examples=25, deadline=None)
        @given(LOTS)
        def send(lots: list[tuple[int, bytes | None, bytes | None, tuple[()], int | None, int]]) -> None:
            asyncio.run_coroutine_threadsafe(check(lots), loop).result(60)

        await asyncio.to_thread(send)
    for topic in topics:
        for partition, stored in (await read_all(kafka, topic)).items():
            sent = written.get((topic.name, partition), [])
            assert [r[1:4] for r in stored] == [r[1:4] for r in sent], "key, value and headers, byte for byte"


@pytest.mark.parametrize("num_neighbours", [4, 60])
@pytest.mark.parametrize("where", ["value", "key", "headers"])
async def test_producer_fails_only_the_record_over_the_limit(
    kafka: KafkaSettings, where: str, num_neighbours: int
) -> None:
    topic, blob = await new_topic(kafka, 1), b"x" * (RECORD_LIMIT_BYTES + MIB)
    records = [record(topic, n) for n in range(num_neighbours)]
    large = records[2]._replace(**{where: (("h", blob),) if where == "headers" else blob})
    records[2] = large
    async with OonaProducer(kafka) as producer:
        deliveries = await producer.deliver(records)
        assert [d.record for d in deliveries if d.error] == [large]
        with pytest.raises(ContractError, match=r"limit|too large"):
            deliveries.positions()
        await producer.send_records([record(topic, num_neighbours)])
    kept = [n for n in range(num_neighbours + 1) if n != 2]
    assert await numbers(kafka, topic) == {0: kept}, "each once, in order"


async def test_producer_bounds_memory_while_the_broker_is_silent(broker: EmbeddedKafka, kafka: KafkaSettings) -> None:
    topic, num_callers, num_each = await new_topic(kafka), 10, 10_000
    value, memory = b"x" * 1000, psutil.Process().memory_info
    records = [Record(topic.name, b"k", value, (), 0, n % 3) for n in range(num_each)]
    signal = Record(TELEMETRY.name, b"k", value, (), 0, 0)
    async with OonaProducer(kafka) as producer:
        await producer.send_records(records[:3])
        broker.pause()
        try:
            before = memory().rss
            began = time.monotonic()
            sends = [asyncio.create_task(producer.deliver(records, timeout_s=4)) for _n in range(num_callers)]
            sends.append(asyncio.create_task(producer.deliver([signal], timeout_s=4)))
            most = 0
            while not all(send.done() for send in sends):
                await asyncio.wait(sends, timeout=0.2)
                most = max(most, memory().rss - before)
            assert time.monotonic() - began < 8
            for send in sends:
                errors = send.result().errors
                assert len(errors) == len(send.result())
                assert {type(e) for e in errors} == {UnavailableError}
            held = 3 * BATCH_BYTES * (2 + num_callers)  # two for each partition, and one for each waiting caller
            assert most < 3 * held < num_callers * num_each * len(value), "no more than the documented bound"
            began = time.monotonic()
            await producer.__aexit__(None, None, None)
            assert time.monotonic() - began < 8.5, "both connections had batches in flight"
        finally:
            broker.resume()
        deliveries = await producer.deliver([signal])
        assert isinstance(deliveries.errors[0], InvariantError), "a closed producer stays closed"


async def test_producer_delivers_once_through_a_broker_restart(broker: EmbeddedKafka, kafka: KafkaSettings) -> None:
    topic, sent = await new_topic(kafka), 0
    async with OonaProducer(kafka) as producer:
        is_over = asyncio.Event()

        async def keep_sending() -> None:
            nonlocal sent
            while not is_over.is_set():
                await producer.send_records([record(topic, n) for n in range(sent, sent + 30)])
                sent += 30

        sending = asyncio.create_task(keep_sending())

        async def is_past(count: int) -> bool:
            return sent > count or sending.done()

        await wait_until_async(lambda: is_past(300), 30, "sends before the kill")
        broker.kill()
        broker.start()
        before = sent
        await wait_until_async(lambda: is_past(before + 300), 60, "sends after it")
        is_over.set()
        await sending
    assert await numbers(kafka, topic) == {p: list(range(p, sent, 3)) for p in range(3)}


async def test_producer_continues_on_a_wiped_broker(broker: EmbeddedKafka, kafka: KafkaSettings) -> None:
    topic = await new_topic(kafka)
    async with OonaProducer(kafka) as producer:
        for start in range(0, 90, 30):  # the sequence numbers of the old cluster are past the first
            await producer.send_records([record(topic, n) for n in range(start, start + 30)])
        broker.stop()
        broker.wipe()
        broker.start()
        await make_topics(kafka, topic)
        for start in range(90, 180, 30):
            positions = await producer.send_records([record(topic, n) for n in range(start, start + 30)])
        assert max(p.offset for p in positions) == 29
    assert await numbers(kafka, topic) == {p: list(range(90 + p, 180, 3)) for p in range(3)}
