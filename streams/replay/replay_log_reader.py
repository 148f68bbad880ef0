"""The log as a replay reads it: one consumer on every partition, opened once and read in rounds.

A rebuild's last round happens under a lock that workers wait for: nothing may have to connect then.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import aiokafka
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.client_options import kafka_error
from esper.oona.log_reader import StoredRecord, assigned_consumer, stored
from esper.oona.records import TopicPartition
from esper.schemas.topics import TopicSpec, all_topics
from esper.streams.worker.batch_projection import Batch

BATCH_RECORDS = 10_000  # folded in one transaction: the larger, the fewer round trips a record
BATCH_BYTES = 8 * 1024 * 1024
GATHERED_BYTES = 64 * 1024 * 1024  # of all partitions together, before the largest is handed on unfilled
POLL_MS = 200
FETCHED_RECORDS = 5_000
SILENT_S = 30.0  # a broker that gives nothing for so long, though there is something left, is away

Offsets = Mapping[TopicPartition, int]


class LogReader:
    """Made by ``open_log``. One ``read`` at a time."""

    def __init__(self, consumer: AIOKafkaConsumer, kafka: KafkaSettings, topics: Sequence[TopicSpec]) -> None:
        self.topics = tuple(topics)
        self._consumer = consumer
        self._kafka = kafka
        self._partitions = [aiokafka.TopicPartition(t.name, n) for t in topics for n in range(t.num_partitions)]

    async def first_offsets(self) -> dict[TopicPartition, int]:
        """The oldest record that each partition still has, of all its topics; so too below."""
        return _by_place(await self._asked(self._consumer.beginning_offsets(self._partitions)))

    async def end_offsets(self) -> dict[TopicPartition, int]:
        """The offset that the next record of each partition will have."""
        return _by_place(await self._asked(self._consumer.end_offsets(self._partitions)))

    async def offsets_at(self, at: datetime) -> dict[TopicPartition, int]:
        """Per partition the first record that the broker took at ``at`` or later; the end where there is none."""
        ends = await self.end_offsets()
        asked = dict.fromkeys(self._partitions, int(at.timestamp() * 1000))
        found = await self._asked(self._consumer.offsets_for_times(asked))
        later = {(tp.topic, tp.partition): seen.offset for tp, seen in found.items() if seen is not None}
        return {**ends, **later}

    async def read(self, starts: Offsets, ends: Offsets) -> AsyncGenerator[Batch, None]:
        """Every record from ``starts`` up to ``ends`` (exclusive), in batches of one partition each.

        Order holds within a partition. Ends lie within the log; a range that is empty gives nothing.

        Raises:
            UnavailableError: the broker gives nothing any more.
        """
        left = {place: end for place, end in ends.items() if starts[place] < end}
        for place in left:
            self._consumer.seek(aiokafka.TopicPartition(*place), starts[place])
            self._consumer.resume(aiokafka.TopicPartition(*place))
        gathered, heard_at = _Gathered(starts), time.monotonic()
        try:
            while left:
                fetched = await self._asked(self._consumer.getmany(timeout_ms=POLL_MS, max_records=FETCHED_RECORDS))
                for tp, records in fetched.items():
                    end = left.get((tp.topic, tp.partition), 0)
                    gathered.add((tp.topic, tp.partition), [stored(r) for r in records if r.offset < end])
                done = [place for place in left if await self._is_past(place, left[place])]
                for place in done:
                    self._consumer.pause(aiokafka.TopicPartition(*place))
                    del left[place]
                for batch in gathered.taken(done):
                    yield batch
                if fetched or done:
                    heard_at = time.monotonic()
                elif time.monotonic() - heard_at > SILENT_S:
                    raise UnavailableError(self._silence(left))
        finally:
            self._consumer.pause(*(aiokafka.TopicPartition(*place) for place in left))

    async def _is_past(self, place: TopicPartition, end: int) -> bool:
        return int(await self._consumer.position(aiokafka.TopicPartition(*place))) >= end

    def _silence(self, left: Mapping[TopicPartition, int]) -> str:
        (topic, partition), *others = sorted(left)
        return (
            f"{self._kafka.bootstrap_servers} gave no record of {topic}[{partition}] (and {len(others)} more "
            f"partitions) for {SILENT_S:.0f} s: is the broker running (`esper status`)? Start again then"
        )

    async def _asked(self, asked: Any) -> Any:
        try:
            async with asyncio.timeout(SILENT_S):
                return await asked
        except (KafkaError, TimeoutError) as error:
            raise kafka_error(error, self._kafka) from error


@asynccontextmanager
async def open_log(kafka: KafkaSettings, topics: Sequence[TopicSpec] | None = None) -> AsyncIterator[LogReader]:
    """A reader of some topics; of every topic and its dead letters where none are named.

    Raises:
        NotAllowedError, UnavailableError: as every client of Oona.
    """
    read = all_topics() if topics is None else topics
    places = [(t.name, n) for t in read for n in range(t.num_partitions)]
    async with assigned_consumer(kafka, places) as consumer:
        consumer.pause(*consumer.assignment())  # before its first fetch
        yield LogReader(consumer, kafka, read)


class _Gathered:
    """Records on their way into batches that are large, and not too large."""

    def __init__(self, starts: Offsets) -> None:
        self._starts = dict(starts)
        self._records: dict[TopicPartition, list[StoredRecord]] = {}
        self._bytes: dict[TopicPartition, int] = {}

    def add(self, place: TopicPartition, records: list[StoredRecord]) -> None:
        if records:
            self._records.setdefault(place, []).extend(records)
            self._bytes[place] = self._bytes.get(place, 0) + sum(len(r.value or b"") for r in records)

    def taken(self, done: Iterable[TopicPartition]) -> list[Batch]:
        """What is full, what will not grow any more, and the largest ones where all are too much together."""
        ready = [p for p in done if p in self._records]
        full = {p for p, r in self._records.items() if len(r) >= BATCH_RECORDS or self._bytes[p] >= BATCH_BYTES}
        ready += sorted(full.difference(ready))
        rest = sum(self._bytes.values()) - sum(self._bytes[p] for p in ready)
        for place in sorted(self._bytes, key=self._bytes.__getitem__, reverse=True):
            if rest <= GATHERED_BYTES:
                break
            if place not in ready:
                ready.append(place)
                rest -= self._bytes[place]
        return [self._batch(place) for place in ready]

    def _batch(self, place: TopicPartition) -> Batch:
        del self._bytes[place]
        batch = Batch(*place, self._starts[place], tuple(self._records.pop(place)))
        self._starts[place] = batch.end
        return batch


def _by_place(offsets: Mapping[aiokafka.TopicPartition, int]) -> dict[TopicPartition, int]:
    return {(tp.topic, tp.partition): offset for tp, offset in offsets.items()}
