"""Reads the log by position, without a consumer group: for trainers, tools and replays.

Stream workers read through Faust (esper.streams). Nothing here ever commits an offset.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiokafka
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from esper.config import KafkaSettings
from esper.oona.client_options import client_options, kafka_error, started
from esper.oona.cloudevents import decode
from esper.oona.records import Headers, Position, TopicPartition, partition_for
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import TopicSpec

POLL_MS = 200
MAX_RECORDS = 5_000


class StoredRecord(NamedTuple):
    """A record as it lies in the log. ``timestamp_ms`` is when the broker took it."""

    position: Position
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int

    def decode(self) -> OonaMessage:
        """The message in it.

        Raises:
            DecodeError, NewerVersionError: as ``esper.oona.cloudevents.decode``.
        """
        return decode(self.position.topic, self.value, self.headers)


def partition_of(key: str, topic: TopicSpec) -> int:
    """The partition that holds a key."""
    return partition_for(key.encode(), topic.num_partitions)


@asynccontextmanager
async def assigned_consumer(
    kafka: KafkaSettings, partitions: Sequence[TopicPartition]
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer that is assigned these (topic, partition) pairs, with no group.

    Raises:
        NotAllowedError: the broker does not let this process in, or hides a topic.
        UnavailableError: no broker answers.
    """
    consumer = AIOKafkaConsumer(
        **client_options(kafka), enable_auto_commit=False, auto_offset_reset="earliest", fetch_max_wait_ms=100
    )
    async with started(consumer, kafka, topics={topic for topic, _partition in partitions}):
        consumer.assign([aiokafka.TopicPartition(topic, partition) for topic, partition in partitions])
        try:
            yield consumer
        except KafkaError as error:
            raise kafka_error(error, kafka) from error


async def end_offsets(kafka: KafkaSettings, topics: Sequence[TopicSpec]) -> dict[TopicPartition, int]:
    """The offset that the next record of each partition will have."""
    pairs = [(t.name, p) for t in topics for p in range(t.num_partitions)]
    async with assigned_consumer(kafka, pairs) as consumer:
        found = await consumer.end_offsets([aiokafka.TopicPartition(*pair) for pair in pairs])
        return {(tp.topic, tp.partition): offset for tp, offset in found.items()}


async def beginning_offsets(kafka: KafkaSettings, topics: Sequence[TopicSpec]) -> dict[TopicPartition, int]:
    """The offset of the oldest record that each partition still has."""
    pairs = [(t.name, p) for t in topics for p in range(t.num_partitions)]
    async with assigned_consumer(kafka, pairs) as consumer:
        found = await consumer.beginning_offsets([aiokafka.TopicPartition(*pair) for pair in pairs])
        return {(tp.topic, tp.partition): offset for tp, offset in found.items()}


async def read_range(
    kafka: KafkaSettings,
    topic: TopicSpec,
    *,
    partition: int | None = None,
    start: Mapping[int, int] | None = None,
    end: Mapping[int, int] | None = None,
) -> AsyncGenerator[StoredRecord, None]:
    """Every record of a topic, or of one partition, from ``start`` up to ``end`` (exclusive).

    Args:
        start: partition -> first offset; the oldest record where one is not named.
        end: partition -> offset to stop before; the end of the log as it is now where it is
            None. Order holds within a partition, not between them.
    """
    numbers = range(topic.num_partitions) if partition is None else (partition,)
    pairs = [(topic.name, n) for n in numbers]
    async with assigned_consumer(kafka, pairs) as consumer:
        assigned = [aiokafka.TopicPartition(*pair) for pair in pairs]
        first = await consumer.beginning_offsets(assigned)
        last = await consumer.end_offsets(assigned)
        remaining = set()
        for tp in assigned:
            begin = max(first[tp], (start or {}).get(tp.partition, 0))
            stop = last[tp] if end is None else min(last[tp], end.get(tp.partition, last[tp]))
            last[tp] = stop
            if begin < stop:
                consumer.seek(tp, begin)
                remaining.add(tp)
            else:
                consumer.pause(tp)
        while remaining:
            async for tp, record in _fetch(consumer):
                if tp in remaining and record.position.offset < last[tp]:
                    yield record
            for tp in list(remaining):
                if await consumer.position(tp) >= last[tp]:
                    consumer.pause(tp)
                    remaining.discard(tp)


async def follow(
    kafka: KafkaSettings,
    topic: TopicSpec,
    *,
    partition: int | None = None,
    start: Mapping[int, int] | None = None,
) -> AsyncGenerator[StoredRecord, None]:
    """Every record as it comes, without end: from ``start``, or from now where it is None."""
    numbers = range(topic.num_partitions) if partition is None else (partition,)
    pairs = [(topic.name, n) for n in numbers]
    async with assigned_consumer(kafka, pairs) as consumer:
        for pair in pairs:
            tp = aiokafka.TopicPartition(*pair)
            if start is None:
                await consumer.seek_to_end(tp)
            else:
                consumer.seek(tp, start.get(tp.partition, 0))
        while True:
            async for _tp, record in _fetch(consumer):
                yield record


async def _fetch(consumer: Any) -> AsyncIterator[tuple[aiokafka.TopicPartition, StoredRecord]]:
    fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=MAX_RECORDS)
    for tp, records in fetched.items():
        for r in records:
            yield tp, stored(r)


def stored(record: Any) -> StoredRecord:
    """A ``StoredRecord`` of an aiokafka ConsumerRecord."""
    position = Position(record.topic, record.partition, record.offset)
    return StoredRecord(position, record.key, record.value, tuple(record.headers), record.timestamp)
