"""Throughput and latency of Oona against aiokafka and confluent-kafka on one broker: `make bench-bus`.

    bench_bus.py                    throughput and latency
    bench_bus.py --hold 300         also 10,000 messages per second for 300 seconds

Throughput: all three send and read the same records (key, value and nine headers as Oona writes them) in turns, each
with its best known settings (batches of 512 KiB); medians of the rounds. Latency: from the send call to the handler of
a reader in another process; events of the control topics are sent at once. For events over 5 ms it prints where the
time was spent.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import NewTopic
from bus_hold import hold
from bus_latency import RAW, measure_latency
from confluent_kafka import Consumer, Producer
from rich.console import Console
from rich.table import Table

from esper.config import KafkaSettings
from esper.embedded.kafka import EmbeddedKafka
from esper.oona.admin.topics import admin_client, apply_topics
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.oona.records import Record, partition_for
from esper.oona.renewable_producer import BATCH_BYTES
from esper.schemas.topics import TopicSpec

SIZES = {200: 40_000, 20_000: 2_000}  # bytes of a value -> records per round
PARTITIONS = (1, 4)
ROUNDS = 3
HEADERS = tuple((f"ce_header{n}", b"a header as long as most") for n in range(9))

Round = Callable[[], Awaitable[float]]


def records(topic: TopicSpec, size: int, count: int) -> list[Record]:
    """Records with 97 keys and values of one size."""
    return [Record(topic.name, f"run-{n % 97}".encode(), b"v" * size, HEADERS, 1_700_000_000_000) for n in range(count)]


async def oona_send(kafka: KafkaSettings, batch: Sequence[Record]) -> float:
    """Seconds until all records are acknowledged."""
    async with OonaProducer(kafka) as producer:
        await producer.send_records(batch[:1])
        began = time.perf_counter()
        assert not (await producer.deliver(batch)).errors
        return time.perf_counter() - began


async def aiokafka_send(kafka: KafkaSettings, batch: Sequence[Record], num_partitions: int) -> float:
    """``oona_send`` with batches of aiokafka."""
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers,
        acks="all",
        enable_idempotence=True,
        max_batch_size=BATCH_BYTES,
        max_request_size=8 * BATCH_BYTES,
    )
    await producer.start()
    topic = batch[0].topic
    try:
        await producer.send_and_wait(topic, b"first")
        began = time.perf_counter()
        builders = [producer.create_batch() for _n in range(num_partitions)]
        futures = []
        for r in batch:
            number = partition_for(r.key or b"", num_partitions)
            fields = {"timestamp": r.timestamp_ms, "key": r.key, "value": r.value, "headers": list(r.headers)}
            if builders[number].append(**fields) is None:
                futures.append(await producer.send_batch(builders[number], topic, partition=number))
                builders[number] = producer.create_batch()
                builders[number].append(**fields)
        for number, builder in enumerate(builders):
            if builder.record_count():
                futures.append(await producer.send_batch(builder, topic, partition=number))
        await asyncio.gather(*futures)
        return time.perf_counter() - began
    finally:
        await producer.stop()


async def confluent_send(kafka: KafkaSettings, batch: Sequence[Record]) -> float:
    """``oona_send`` with librdkafka, which sends in its own threads."""
    producer = Producer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "batch.size": BATCH_BYTES,
            "linger.ms": 5,
            "queue.buffering.max.messages": 1_000_000,
            "queue.buffering.max.kbytes": 1_000_000,
        }
    )
    producer.produce(batch[0].topic, b"first")
    producer.flush(30)
    began = time.perf_counter()
    for r in batch:
        producer.produce(r.topic, r.value, r.key, headers=list(r.headers), timestamp=r.timestamp_ms)
    assert producer.flush(60) == 0
    return time.perf_counter() - began


async def oona_read(kafka: KafkaSettings, topic: TopicSpec) -> tuple[int, float]:
    """Number of records and seconds to read a topic with Oona's range reader."""
    began, count = time.perf_counter(), 0
    async for _record in read_range(kafka, topic):
        count += 1
    return count, time.perf_counter() - began


async def aiokafka_read(kafka: KafkaSettings, topic: TopicSpec, count: int) -> tuple[int, float]:
    """``oona_read`` with aiokafka's getmany."""
    began, seen = time.perf_counter(), 0
    consumer = AIOKafkaConsumer(
        topic.name, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    try:
        while seen < count:
            fetched = await consumer.getmany(timeout_ms=200, max_records=5_000)
            seen += sum(map(len, fetched.values()))
    finally:
        await consumer.stop()
    return seen, time.perf_counter() - began


async def confluent_read(kafka: KafkaSettings, topic: TopicSpec, count: int) -> tuple[int, float]:
    """``oona_read`` with librdkafka's consume."""
    began, seen = time.perf_counter(), 0
    consumer = Consumer(
        {"bootstrap.servers": kafka.bootstrap_servers, "group.id": f"g{began}", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic.name])
    while seen < count:
        seen += len(consumer.consume(5_000, 0.2))
    consumer.close()
    return seen, time.perf_counter() - began


async def throughput(console: Console, kafka: KafkaSettings) -> None:
    """Send and read in turns; print medians and the ratio of Oona to aiokafka."""
    sent, read = Table(title="sent, records/s"), Table(title="read, records/s")
    for table in (sent, read):
        for column in ("value", "partitions", "aiokafka", "confluent", "Oona", "Oona / aiokafka"):
            table.add_column(column, justify="right")
    for size, count in SIZES.items():
        for num_partitions in PARTITIONS:
            topic = TopicSpec(f"bench-{size}-{num_partitions}", num_partitions)
            async with admin_client(kafka) as client:
                await client.create_topics([NewTopic(topic.name, num_partitions, 1)])
            batch = records(topic, size, count)
            sends = {
                "aiokafka": lambda b=batch, n=num_partitions: aiokafka_send(kafka, b, n),
                "confluent": lambda b=batch: confluent_send(kafka, b),
                "Oona": lambda b=batch: oona_send(kafka, b),
            }
            rates: dict[str, list[float]] = {name: [] for name in sends}
            for _round in range(ROUNDS):
                for name, send in sends.items():
                    rates[name].append(count / await send())
            _add_row(sent, size, num_partitions, rates)
            total = (await oona_read(kafka, topic))[0]
            reads = {
                "aiokafka": lambda t=topic, n=total: aiokafka_read(kafka, t, n),
                "confluent": lambda t=topic, n=total: confluent_read(kafka, t, n),
                "Oona": lambda t=topic: oona_read(kafka, t),
            }
            rates = {name: [] for name in reads}
            for _round in range(ROUNDS):
                for name, reading in reads.items():
                    seen, seconds = await reading()
                    rates[name].append(seen / seconds)
            _add_row(read, size, num_partitions, rates)
    console.print(sent)
    console.print(read)


def _add_row(table: Table, size: int, num_partitions: int, rates: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ratios = sorted(o / a for o, a in zip(rates["Oona"], rates["aiokafka"], strict=True))
    table.add_row(
        f"{size:,} B",
        str(num_partitions),
        *(f"{medians[name]:,.0f}" for name in ("aiokafka", "confluent", "Oona")),
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})",
    )


async def make_topics(kafka: KafkaSettings) -> None:
    """Create Esper's topics and one for records that are not Esper's events."""
    await apply_topics(kafka)
    async with admin_client(kafka) as client:
        await client.create_topics([NewTopic(RAW.name, RAW.num_partitions, 1)])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--hold", type=float, default=0.0, help="duration of the test with 10,000 messages/s, in seconds"
    )
    parser.add_argument("--latency", type=float, default=20.0, help="duration of each latency measurement, in seconds")
    parser.add_argument("--no-throughput", action="store_true")
    options = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="esper-bench-", dir="/var/tmp") as folder:
        kafka = EmbeddedKafka(Path(folder))
        kafka.start()
        settings = KafkaSettings(bootstrap_servers=kafka.bootstrap_servers)
        try:
            asyncio.run(make_topics(settings))
            if not options.no_throughput:
                asyncio.run(throughput(console, settings))
            if options.latency:
                measure_latency(console, settings, options.latency)
            if options.hold:
                hold(console, settings, options.hold)
        finally:
            kafka.stop()


if __name__ == "__main__":
    main()
