"""Reads the log by offset, without a consumer group: for trainers, command-line tools and replays.

Never commits an offset. ``esper.oona.consumer`` reads as a member of a group; stream workers read through Faust.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiokafka
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from esper.config import KafkaSettings
from esper.oona.broker_errors import kafka_error
from esper.oona.client_options import client_options, started
from esper.oona.cloudevents import decode
from esper.oona.records import Headers, Position, TopicPartition, partition_for
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import TopicSpec

POLL_MS = 200
MAX_RECORDS = 5_000


class StoredRecord(NamedTuple):
    """A record in the log. ``timestamp_ms`` is when the broker appended it, in milliseconds since 1970."""

    position: Position
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int

    def decode(self) -> OonaMessage:
        """Decode the message.

        Raises:
            DecodeError, NewerVersionError: as ``esper.oona.cloudevents.decode``.
        """
        return decode(self.position.topic, self.value, self.headers)


def partition_of(key: str, topic: TopicSpec) -> int:
    """The number of the partition that holds a key's records."""
    return partition_for(key.encode(), topic.num_partitions)


@asynccontextmanager
async def assigned_consumer(
    kafka: KafkaSettings, partitions: Sequence[TopicPartition]
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer of these partitions, in no group.

    Raises:
        NotAllowedError: the broker refuses this client, or hides a topic from it.
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
    async with assigned_consumer(kafka, [tp for topic in topics for tp in topic.partitions]) as consumer:
        return dict(await consumer.end_offsets(consumer.assignment()))


async def beginning_offsets(kafka: KafkaSettings, topics: Sequence[TopicSpec]) -> dict[TopicPartition, int]:
    """The offset of the oldest record in each partition."""
    async with assigned_consumer(kafka, [tp for topic in topics for tp in topic.partitions]) as consumer:
        return dict(await consumer.beginning_offsets(consumer.assignment()))


async def read_range(
    kafka: KafkaSettings,
    topic: TopicSpec,
    *,
    partition: int | None = None,
    start: Mapping[int, int] | None = None,
    end: Mapping[int, int] | None = None,
) -> AsyncGenerator[StoredRecord, None]:
    """Every record of a topic or of one partition. Records of one partition come in order; partitions interleave.

    Args:
        partition: the only partition to read; all of them if None.
        start: partition -> first offset; a partition that is not named is read from its oldest record.
        end: partition -> offset to stop before; a partition that is not named is read up to the current end of the log.

    Raises:
        NotAllowedError, UnavailableError: as ``assigned_consumer``.
    """
    async with assigned_consumer(kafka, _partitions_of(topic, partition)) as consumer:
        assigned = consumer.assignment()
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
    """Every record as it is appended, without end.

    Args:
        partition: the only partition to read; all of them if None.
        start: partition -> first offset (0 where a partition is not named); None starts at the end of the log.

    Raises:
        NotAllowedError, UnavailableError: as ``assigned_consumer``.
    """
    async with assigned_consumer(kafka, _partitions_of(topic, partition)) as consumer:
        for tp in consumer.assignment():
            if start is None:
                await consumer.seek_to_end(tp)
            else:
                consumer.seek(tp, start.get(tp.partition, 0))
        while True:
            async for _tp, record in _fetch(consumer):
                yield record


def _partitions_of(topic: TopicSpec, partition: int | None) -> list[TopicPartition]:
    return topic.partitions if partition is None else [(topic.name, partition)]


async def _fetch(consumer: Any) -> AsyncIterator[tuple[aiokafka.TopicPartition, StoredRecord]]:
    fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=MAX_RECORDS)
    for tp, records in fetched.items():
        for r in records:
            yield tp, to_stored_record(r)


def to_stored_record(record: Any) -> StoredRecord:
    """The ``StoredRecord`` for an aiokafka ConsumerRecord."""
    position = Position(record.topic, record.partition, record.offset)
    return StoredRecord(position, record.key, record.value, tuple(record.headers), record.timestamp)
