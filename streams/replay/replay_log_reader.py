"""Reads ranges of the log for a replay: one consumer on every partition, opened once and used for every range.

The last range of a rebuild is read under a lock that workers wait for, so no connection may be opened then.
aiokafka's TopicPartition is a named tuple, equal to the plain (topic, partition) of Oona.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import aiokafka
from aiokafka import AIOKafkaConsumer

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.broker_errors import CLIENT_ERRORS, kafka_error
from esper.oona.log_reader import StoredRecord, assigned_consumer, to_stored_record
from esper.oona.records import TopicPartition
from esper.schemas.topics import TopicSpec, all_topics
from esper.streams.worker.batch_projection import Batch

BATCH_RECORDS = 10_000  # per transaction: larger batches need fewer round trips per record
BATCH_BYTES = 8 * 1024 * 1024
MAX_BUFFERED_BYTES = 64 * 1024 * 1024  # over all partitions; beyond it, the largest are returned before they are full
POLL_MS = 200
FETCHED_RECORDS = 5_000
BROKER_TIMEOUT_S = 30.0  # without any record, while some are left: the broker counts as unavailable

Offsets = Mapping[TopicPartition, int]


class LogReader:
    """Made by ``open_log``. Only one ``read`` may run at a time."""

    def __init__(self, consumer: AIOKafkaConsumer, kafka: KafkaSettings, topics: Sequence[TopicSpec]) -> None:
        self.topics = tuple(topics)
        self._consumer = consumer
        self._kafka = kafka
        self._partitions = [aiokafka.TopicPartition(*tp) for topic in topics for tp in topic.partitions]

    async def first_offsets(self) -> dict[TopicPartition, int]:
        """The oldest offset of each partition."""
        return dict(await self._request(self._consumer.beginning_offsets(self._partitions)))

    async def end_offsets(self) -> dict[TopicPartition, int]:
        """The offset of the next record of each partition."""
        return dict(await self._request(self._consumer.end_offsets(self._partitions)))

    async def offsets_at(self, at: datetime) -> dict[TopicPartition, int]:
        """The offset of the first record with a broker timestamp of ``at`` or later; the end if there is none."""
        ends = await self.end_offsets()
        timestamps = dict.fromkeys(self._partitions, int(at.timestamp() * 1000))
        found = await self._request(self._consumer.offsets_for_times(timestamps))
        later = {tp: seen.offset for tp, seen in found.items() if seen is not None}
        return {**ends, **later}

    async def read(self, starts: Offsets, ends: Offsets) -> AsyncGenerator[Batch, None]:
        """Every record from ``starts`` up to ``ends`` (exclusive), in batches of one partition each.

        Records of a partition are in order. The ends must lie within the log.

        Raises:
            UnavailableError: the broker returns no more records.
        """
        left = {tp: end for tp, end in ends.items() if starts[tp] < end}
        for tp in left:
            self._consumer.seek(aiokafka.TopicPartition(*tp), starts[tp])
            self._consumer.resume(aiokafka.TopicPartition(*tp))
        buffer, received_at = _BatchBuffer(starts), time.monotonic()
        try:
            while left:
                fetched = await self._request(self._consumer.getmany(timeout_ms=POLL_MS, max_records=FETCHED_RECORDS))
                for tp, records in fetched.items():
                    end = left.get(tp, 0)
                    buffer.add(tp, [to_stored_record(r) for r in records if r.offset < end])
                done = [tp for tp in left if await self._is_past(tp, left[tp])]
                for tp in done:
                    self._consumer.pause(aiokafka.TopicPartition(*tp))
                    del left[tp]
                for batch in buffer.pop_ready(done):
                    yield batch
                if fetched or done:
                    received_at = time.monotonic()
                elif time.monotonic() - received_at > BROKER_TIMEOUT_S:
                    raise UnavailableError(self._timeout_message(left))
        finally:
            self._consumer.pause(*(aiokafka.TopicPartition(*tp) for tp in left))

    async def _is_past(self, tp: TopicPartition, end: int) -> bool:
        return int(await self._consumer.position(aiokafka.TopicPartition(*tp))) >= end

    def _timeout_message(self, left: Mapping[TopicPartition, int]) -> str:
        (topic, partition), *others = sorted(left)
        return (
            f"{self._kafka.bootstrap_servers} returned no record of {topic}[{partition}] (and {len(others)} more "
            f"partitions) for {BROKER_TIMEOUT_S:.0f} s: check that the broker runs (`esper status`), then start again"
        )

    async def _request(self, request: Any) -> Any:
        try:
            async with asyncio.timeout(BROKER_TIMEOUT_S):
                return await request
        except CLIENT_ERRORS as error:
            raise kafka_error(error, self._kafka) from error


@asynccontextmanager
async def open_log(kafka: KafkaSettings, topics: Sequence[TopicSpec] | None = None) -> AsyncIterator[LogReader]:
    """Open a reader of some topics; of every topic, dead-letter topics included, if None.

    Raises:
        NotAllowedError, UnavailableError: as every Kafka client of Oona.
    """
    read = all_topics() if topics is None else topics
    async with assigned_consumer(kafka, [tp for topic in read for tp in topic.partitions]) as consumer:
        consumer.pause(*consumer.assignment())  # before the first fetch
        yield LogReader(consumer, kafka, read)


class _BatchBuffer:
    """Collects fetched records into large batches, within a bound on memory."""

    def __init__(self, starts: Offsets) -> None:
        self._starts = dict(starts)
        self._records: dict[TopicPartition, list[StoredRecord]] = {}
        self._bytes: dict[TopicPartition, int] = {}

    def add(self, tp: TopicPartition, records: list[StoredRecord]) -> None:
        if records:
            self._records.setdefault(tp, []).extend(records)
            self._bytes[tp] = self._bytes.get(tp, 0) + sum(len(r.value or b"") for r in records)

    def pop_ready(self, done: Iterable[TopicPartition]) -> list[Batch]:
        """Remove and return the full batches, those of ``done``, and the largest ones if the buffer is too large."""
        ready = [p for p in done if p in self._records]
        full = {p for p, r in self._records.items() if len(r) >= BATCH_RECORDS or self._bytes[p] >= BATCH_BYTES}
        ready += sorted(full.difference(ready))
        num_bytes = sum(self._bytes.values()) - sum(self._bytes[p] for p in ready)
        for tp in sorted(self._bytes, key=self._bytes.__getitem__, reverse=True):
            if num_bytes <= MAX_BUFFERED_BYTES:
                break
            if tp not in ready:
                ready.append(tp)
                num_bytes -= self._bytes[tp]
        return [self._batch(tp) for tp in ready]

    def _batch(self, tp: TopicPartition) -> Batch:
        del self._bytes[tp]
        batch = Batch(*tp, self._starts[tp], tuple(self._records.pop(tp)))
        self._starts[tp] = batch.end
        return batch
