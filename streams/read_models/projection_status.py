"""How the projections stand against the log: what is folded, what waits, what stopped and why.

Looks from outside, at Postgres and at Kafka, each of which may be away. A partition is red where no worker can go on:
that shows in its position, or in the first record that is not folded.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiokafka

from esper.config import KafkaSettings, Settings
from esper.errors import DecodeError, NewerVersionError, PositionError, UnavailableError
from esper.oona.admin.topics import cluster_id
from esper.oona.log_reader import StoredRecord, assigned_consumer, beginning_offsets, end_offsets, stored
from esper.oona.records import TopicPartition
from esper.schemas.topics import TOPICS, TopicSpec, all_topics
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect_pool
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.sql_queries import queries
from esper.streams.database.stored_positions import check_cluster_id, check_position, stored_positions

LOOK_S = 5.0  # for the first records that are not folded; what did not come by then stays unknown
POLL_MS = 100


@dataclass(frozen=True, slots=True)
class TopicLag:
    """One topic: records in the log, and how many are not folded yet (None for dead letters)."""

    topic: str
    num_records: int
    lag: int | None


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """One partition; what is not known, since Kafka or Postgres is away, is None.

    Attributes:
        first: the oldest offset that the log has; ``end`` the next one that it will have.
        position: the next offset to be folded; None also where nothing was folded yet.
        oldest_age_s: since the broker took the first record that is not folded; None where all are.
        red: why no worker can go on.
    """

    topic: str
    partition: int
    first: int | None = None
    end: int | None = None
    position: int | None = None
    oldest_age_s: float | None = None
    red: str | None = None

    @property
    def num_records(self) -> int | None:
        """What the log holds."""
        return None if self.first is None or self.end is None else self.end - self.first

    @property
    def lag(self) -> int | None:
        """Records that are not folded."""
        if self.first is None or self.end is None:
            return None
        return max(0, self.end - max(self.first, self.first if self.position is None else self.position))


@dataclass(frozen=True, slots=True)
class DeadLetterCounts:
    """Dead letters of a topic: passed over; of these waiting for Kafka; of these refused by it for good."""

    num_dead: int = 0
    num_pending: int = 0
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class RefusedDeadLetter:
    """A letter that Kafka will never take, and why. It stays in the table pending_letters."""

    topic: str
    partition: int
    offset: int
    why: str


@dataclass(frozen=True, slots=True)
class ProjectionStatus:
    """Everything at one moment. ``log_trouble`` and ``rows_trouble`` say why a side is not known, None where it is."""

    partitions: tuple[PartitionStatus, ...]
    letters: Mapping[str, DeadLetterCounts]
    refused: tuple[RefusedDeadLetter, ...]
    log_trouble: str | None
    rows_trouble: str | None

    @property
    def red(self) -> tuple[PartitionStatus, ...]:
        """Where no worker can go on."""
        return tuple(p for p in self.partitions if p.red is not None)


@dataclass(slots=True)
class _Rows:
    """What Postgres says."""

    positions: dict[TopicPartition, int] = field(default_factory=dict)
    letters: dict[str, DeadLetterCounts] = field(default_factory=dict)
    refused: tuple[RefusedDeadLetter, ...] = ()
    cluster: str | None = None


@dataclass(slots=True)
class _Log:
    """What Kafka says."""

    first: dict[TopicPartition, int] = field(default_factory=dict)
    end: dict[TopicPartition, int] = field(default_factory=dict)
    cluster: str | None = None
    unfolded: dict[TopicPartition, StoredRecord] = field(default_factory=dict)


async def topic_lags(connection: Connection, kafka: KafkaSettings) -> list[TopicLag]:
    """Every topic and its dead letters."""
    positions = await stored_positions(connection)
    first, last = await beginning_offsets(kafka, all_topics()), await end_offsets(kafka, all_topics())
    found = []
    for spec in all_topics():
        places = _places(spec)
        records = sum(last[p] - first[p] for p in places)
        behind = sum(last[p] - positions.get(p, first[p]) for p in places) if spec in TOPICS else None
        found.append(TopicLag(spec.name, records, behind))
    return found


async def projection_status(settings: Settings) -> ProjectionStatus:
    """Ask both sides. Never raises because one is away: it says so.

    Raises:
        ConfigError: the settings name no Kafka or no Postgres, or the schema is not migrated.
        NotAllowedError: one of them refuses this user.
    """
    settings.need_kafka(), settings.need_postgres()
    rows, rows_trouble = _Rows(), None
    try:
        rows = await _ask_postgres(settings)
    except UnavailableError as error:
        rows_trouble = str(error)
    log, log_trouble = _Log(), None
    try:
        log = await _ask_kafka(settings.need_kafka(), rows.positions, is_known=rows_trouble is None)
    except UnavailableError as error:
        log_trouble = str(error)
    partitions = tuple(_partition(place, rows, log, settings.need_kafka()) for t in TOPICS for place in _places(t))
    return ProjectionStatus(partitions, rows.letters, rows.refused, log_trouble, rows_trouble)


def _places(spec: TopicSpec) -> list[TopicPartition]:
    return [(spec.name, n) for n in range(spec.num_partitions)]


async def _ask_postgres(settings: Settings) -> _Rows:
    postgres, sql = settings.need_postgres(), queries("dead_letters")
    try:
        async with connect_pool(postgres) as pool, pool.acquire() as connection:
            counts = {
                r["topic"]: DeadLetterCounts(r["num_dead"], r["num_pending"], r["num_refused"])
                async for r in sql.letter_counts(connection)
            }
            refused = [RefusedDeadLetter(*row) async for row in sql.refused(connection)]
            cluster = await queries("positions").cluster_id(connection)
            return _Rows(await stored_positions(connection), counts, tuple(refused), cluster)
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error


async def _ask_kafka(kafka: KafkaSettings, positions: Mapping[TopicPartition, int], *, is_known: bool) -> _Log:
    log = _Log(await beginning_offsets(kafka, TOPICS), await end_offsets(kafka, TOPICS), await cluster_id(kafka))
    if is_known:
        starts = {place: max(positions.get(place, 0), log.first[place]) for place in log.first}
        behind = {place: start for place, start in starts.items() if start < log.end[place]}
        log.unfolded = await _first_records(kafka, behind) if behind else {}
    return log


async def _first_records(
    kafka: KafkaSettings, starts: Mapping[TopicPartition, int]
) -> dict[TopicPartition, StoredRecord]:
    """The first record of each partition from an offset on, as far as they come soon."""
    found: dict[TopicPartition, StoredRecord] = {}
    async with assigned_consumer(kafka, list(starts)) as consumer:
        for place, start in starts.items():
            consumer.seek(aiokafka.TopicPartition(*place), start)
        end = time.monotonic() + LOOK_S
        while len(found) < len(starts) and time.monotonic() < end:
            fetched = await consumer.getmany(timeout_ms=POLL_MS)
            for tp, records in fetched.items():
                found.setdefault((tp.topic, tp.partition), stored(records[0]))
                consumer.pause(tp)
            await asyncio.sleep(0)
    return found


def _partition(place: TopicPartition, rows: _Rows, log: _Log, kafka: KafkaSettings) -> PartitionStatus:
    first = log.unfolded.get(place)
    return PartitionStatus(
        *place,
        first=log.first.get(place),
        end=log.end.get(place),
        position=rows.positions.get(place),
        oldest_age_s=None if first is None else max(0.0, time.time() - first.timestamp_ms / 1000),
        red=_red(place, rows, log, kafka),
    )


def _red(place: TopicPartition, rows: _Rows, log: _Log, kafka: KafkaSettings) -> str | None:
    if place not in rows.positions and place not in log.unfolded:
        return None
    try:
        if log.cluster is not None:
            check_cluster_id(rows.cluster, log.cluster, kafka)
        if place in rows.positions and place in log.end:
            check_position(place, rows.positions[place], log.first, log.end)
        if place in log.unfolded:
            log.unfolded[place].decode()
    except (PositionError, NewerVersionError) as error:
        return str(error)
    except DecodeError:
        pass  # a worker will pass over it
    return None
