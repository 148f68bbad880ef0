"""Compares the projections with the log: what is projected, what lags, which partitions stopped and why.

Reads Postgres and Kafka from outside the workers; either may be unavailable. A partition counts as stopped if no
worker can continue: its stored position lies outside the log, or its next record needs a newer program.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiokafka

from esper.config import KafkaSettings, Settings
from esper.errors import DecodeError, NewerVersionError, PositionError, UnavailableError
from esper.oona.admin.topics import cluster_id
from esper.oona.log_reader import StoredRecord, assigned_consumer, beginning_offsets, end_offsets, to_stored_record
from esper.oona.records import TopicPartition
from esper.schemas.topics import TOPICS, all_topics
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect_pool
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.sql_queries import queries
from esper.streams.database.stored_positions import check_cluster_id, check_position, stored_positions

FIRST_RECORDS_TIMEOUT_S = 5.0  # for the first record of every lagging partition; the others stay unknown
POLL_MS = 100


@dataclass(frozen=True, slots=True)
class TopicLag:
    """Records of a topic, and how many of them are not projected (None for dead-letter topics)."""

    topic: str
    num_records: int
    lag: int | None


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """The status of one partition. A value is None if Kafka or Postgres did not answer.

    Attributes:
        first: the oldest offset in the log; ``end`` the offset of the next record.
        position: the next offset to project; also None if nothing was projected yet.
        oldest_age_s: the age of the first record that is not projected; None if there is none.
        stop_reason: why no worker can continue; None if one can.
    """

    topic: str
    partition: int
    first: int | None = None
    end: int | None = None
    position: int | None = None
    oldest_age_s: float | None = None
    stop_reason: str | None = None

    @property
    def num_records(self) -> int | None:
        """How many offsets the log spans."""
        return None if self.first is None or self.end is None else self.end - self.first

    @property
    def lag(self) -> int | None:
        """How many records are not projected."""
        if self.first is None or self.end is None:
            return None
        return max(0, self.end - max(self.first, self.first if self.position is None else self.position))


@dataclass(frozen=True, slots=True)
class DeadLetterCounts:
    """Dead letters of a topic: all; those that wait to be sent to Kafka; those that Kafka refused for good."""

    num_dead: int = 0
    num_pending: int = 0
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class RefusedDeadLetter:
    """A dead letter that Kafka refused for good. It stays in the table pending_letters."""

    topic: str
    partition: int
    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class ProjectionStatus:
    """The status of every partition at one time.

    Attributes:
        kafka_error: why Kafka's side is unknown; ``postgres_error`` likewise. None if it is known.
    """

    partitions: tuple[PartitionStatus, ...]
    dead_letters: Mapping[str, DeadLetterCounts]
    refused: tuple[RefusedDeadLetter, ...]
    kafka_error: str | None
    postgres_error: str | None

    @property
    def stopped(self) -> tuple[PartitionStatus, ...]:
        """The partitions where no worker can continue."""
        return tuple(p for p in self.partitions if p.stop_reason is not None)


@dataclass(slots=True)
class _PostgresSide:
    positions: dict[TopicPartition, int] = field(default_factory=dict)
    dead_letters: dict[str, DeadLetterCounts] = field(default_factory=dict)
    refused: tuple[RefusedDeadLetter, ...] = ()
    cluster: str | None = None


@dataclass(slots=True)
class _KafkaSide:
    first: dict[TopicPartition, int] = field(default_factory=dict)
    end: dict[TopicPartition, int] = field(default_factory=dict)
    cluster: str | None = None
    next_records: dict[TopicPartition, StoredRecord] = field(default_factory=dict)


async def topic_lags(connection: Connection, kafka: KafkaSettings) -> list[TopicLag]:
    """The lag of every topic, dead-letter topics included."""
    positions = await stored_positions(connection)
    first, end = await beginning_offsets(kafka, all_topics()), await end_offsets(kafka, all_topics())
    lags = []
    for spec in all_topics():
        num_records = sum(end[p] - first[p] for p in spec.partitions)
        lag = sum(end[p] - positions.get(p, first[p]) for p in spec.partitions) if spec in TOPICS else None
        lags.append(TopicLag(spec.name, num_records, lag))
    return lags


async def projection_status(settings: Settings) -> ProjectionStatus:
    """Read the status from Postgres and Kafka. A side that does not answer is reported, not raised.

    Raises:
        ConfigError: the settings name no Kafka or no Postgres, or the schema lacks a migration.
        NotAllowedError: Kafka or Postgres refuses this user.
    """
    kafka = settings.need_kafka()
    settings.need_postgres()
    rows, rows_error = _PostgresSide(), None
    try:
        rows = await _read_postgres(settings)
    except UnavailableError as error:
        rows_error = str(error)
    log, log_error = _KafkaSide(), None
    try:
        log = await _read_kafka(kafka, None if rows_error else rows.positions)
    except UnavailableError as error:
        log_error = str(error)
    partitions = tuple(_partition_status(p, rows, log, kafka) for spec in TOPICS for p in spec.partitions)
    return ProjectionStatus(partitions, rows.dead_letters, rows.refused, log_error, rows_error)


async def _read_postgres(settings: Settings) -> _PostgresSide:
    postgres, sql = settings.need_postgres(), queries("dead_letters")
    try:
        async with connect_pool(postgres) as pool, pool.acquire() as connection:
            counts = {
                r["topic"]: DeadLetterCounts(r["num_dead"], r["num_pending"], r["num_refused"])
                async for r in sql.counts_by_topic(connection)
            }
            refused = [RefusedDeadLetter(*row) async for row in sql.refused(connection)]
            cluster = await queries("positions").cluster_id(connection)
            return _PostgresSide(await stored_positions(connection), counts, tuple(refused), cluster)
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error


async def _read_kafka(kafka: KafkaSettings, positions: Mapping[TopicPartition, int] | None) -> _KafkaSide:
    """The log's side; without positions, the first records that are not projected stay unknown."""
    log = _KafkaSide(await beginning_offsets(kafka, TOPICS), await end_offsets(kafka, TOPICS), await cluster_id(kafka))
    if positions is not None:
        starts = {tp: max(positions.get(tp, 0), first) for tp, first in log.first.items()}
        behind = {tp: start for tp, start in starts.items() if start < log.end[tp]}
        log.next_records = await _first_records(kafka, behind) if behind else {}
    return log


async def _first_records(
    kafka: KafkaSettings, starts: Mapping[TopicPartition, int]
) -> dict[TopicPartition, StoredRecord]:
    """The first record of each partition at or after an offset, as far as they arrive in time."""
    found: dict[TopicPartition, StoredRecord] = {}
    async with assigned_consumer(kafka, list(starts)) as consumer:
        for tp, start in starts.items():
            consumer.seek(aiokafka.TopicPartition(*tp), start)
        deadline = time.monotonic() + FIRST_RECORDS_TIMEOUT_S
        while len(found) < len(starts) and time.monotonic() < deadline:
            fetched = await consumer.getmany(timeout_ms=POLL_MS)
            for partition, records in fetched.items():
                found.setdefault((partition.topic, partition.partition), to_stored_record(records[0]))
                consumer.pause(partition)
            await asyncio.sleep(0)
    return found


def _partition_status(
    tp: TopicPartition, rows: _PostgresSide, log: _KafkaSide, kafka: KafkaSettings
) -> PartitionStatus:
    oldest = log.next_records.get(tp)
    return PartitionStatus(
        *tp,
        first=log.first.get(tp),
        end=log.end.get(tp),
        position=rows.positions.get(tp),
        oldest_age_s=None if oldest is None else max(0.0, time.time() - oldest.timestamp_ms / 1000),
        stop_reason=_stop_reason(tp, rows, log, kafka),
    )


def _stop_reason(tp: TopicPartition, rows: _PostgresSide, log: _KafkaSide, kafka: KafkaSettings) -> str | None:
    if tp not in rows.positions and tp not in log.next_records:
        return None
    try:
        if log.cluster is not None:
            check_cluster_id(rows.cluster, log.cluster, kafka)
        if tp in rows.positions and tp in log.end:
            check_position(tp, rows.positions[tp], log.first, log.end)
        if tp in log.next_records:
            log.next_records[tp].decode()
    except (PositionError, NewerVersionError) as error:
        return str(error)
    except DecodeError:
        pass  # a worker writes a dead letter and continues
    return None
