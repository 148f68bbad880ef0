"""Projects one batch of one partition, effectively once.

The steps, in the order that makes this correct:
1. decode every record; records that cannot be decoded get a dead letter with the reason;
2. in one transaction: lock the partition's position; drop records below it; refuse a gap; record the dead letters;
   drop redriven events that were projected before, and resends by their sequence; project; record the progress of
   each run; move the position past the batch;
3. the caller sends the dead letters (``esper.streams.dead_letters``).
A newer version of a known event type ends the batch before it, and the caller stops the partition. The partition's
cache is cleared whenever the transaction fails.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from esper.errors import DecodeError, NewerVersionError, PositionError
from esper.oona.dead_letters.dead_letter import first_origin
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position
from esper.schemas.events import TrainerEvent
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.dead_letters import Undecodable, record_dead_letters
from esper.streams.projectors import PROJECTORS
from esper.streams.projectors.health_report_decoder import HealthReport, read_report
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import PartitionCache, Progress, RunKey

NOT_SKIPPED: Mapping[Position, DecodeError] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive records of one partition.

    Attributes:
        start: the reader's position before the fetch. Offsets may be missing between the records (expired records,
            transaction markers); that is no gap.
        may_begin: whether a partition without a stored position may begin here, since its log does.
    """

    topic: str
    partition: int
    start: int
    records: tuple[StoredRecord, ...]
    may_begin: bool = True

    @property
    def end(self) -> int:
        """The position after the batch."""
        return self.records[-1].position.offset + 1 if self.records else self.start


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """A decoded batch. It ends at ``end``, before the record that raised ``newer`` if there is one."""

    events: tuple[ProjectedEvent, ...]
    undecodable: tuple[Undecodable, ...]
    end: int
    newer: NewerVersionError | None


@dataclass(frozen=True, slots=True)
class ProjectedBatch:
    """The result of a batch: new events, whether dead letters may be pending, and the transaction's duration."""

    num_events: int
    has_dead_letters: bool
    transaction_s: float


def decode_batch(batch: Batch, skipped: Mapping[Position, DecodeError] = NOT_SKIPPED) -> DecodedBatch:
    """Decode records up to the first that needs a newer program.

    Args:
        skipped: records to treat as undecodable whatever their content, with the reason.
    """
    events: list[ProjectedEvent] = []
    undecodable: list[Undecodable] = []
    for record in batch.records:
        try:
            if skipped and record.position in skipped:
                raise skipped[record.position]
            events.append(_decode_record(record))
        except DecodeError as error:
            undecodable.append((record, error))
        except NewerVersionError as error:
            return DecodedBatch(tuple(events), tuple(undecodable), record.position.offset, error)
    return DecodedBatch(tuple(events), tuple(undecodable), batch.end, None)


async def project_batch(
    connection: Connection,
    batch: Batch,
    replayed: Mapping[Position, DecodeError] | None = None,
    cache: PartitionCache | None = None,
) -> ProjectedBatch:
    """Project a batch. Idempotent: projecting it again, in whole or in part, changes nothing.

    Args:
        replayed: only in a replay: the records that live workers skipped. No dead letter is sent then.
        cache: the cache of this partition, kept by the same reader; without one everything is read from Postgres.

    Raises:
        PositionError: the batch starts beyond the stored position.
        NewerVersionError: a record needs a newer program; everything before it was projected.
    """
    decoded, began = decode_batch(batch, replayed or NOT_SKIPPED), time.perf_counter()
    cache = cache if cache is not None else PartitionCache()
    try:
        async with connection.transaction():
            fresh = await _project_decoded(connection, batch, decoded, cache, to_be_sent=replayed is None)
    except BaseException:
        cache.clear()
        raise
    if decoded.newer is not None:
        raise decoded.newer
    return ProjectedBatch(fresh, bool(decoded.undecodable), time.perf_counter() - began)


async def _project_decoded(
    connection: Connection, batch: Batch, decoded: DecodedBatch, cache: PartitionCache, *, to_be_sent: bool
) -> int:
    """The body of the transaction; returns the number of new events."""
    stored = await _lock_position(connection, batch, cache)
    events: Sequence[ProjectedEvent] = decoded.events
    if batch.records and batch.records[0].position.offset < stored:
        events = [e for e in events if e.position.offset >= stored]
    undecodable = [u for u in decoded.undecodable if u[0].position.offset >= stored]
    if undecodable:
        await record_dead_letters(connection, undecodable, to_be_sent=to_be_sent)  # a redrive may follow in the batch
        cache.dead_letters = None
    fresh = await _without_redriven(connection, batch, events, cache)
    runs = await _load_progress(connection, batch.topic, fresh, cache)
    fresh = _without_resends(fresh, cache)
    if fresh:
        await PROJECTORS[batch.topic](connection, fresh, cache)
    await _record_progress(connection, batch.topic, runs, cache)
    if decoded.end > stored:
        await queries("positions").update_position(
            connection, topic=batch.topic, log_partition=batch.partition, next_offset=decoded.end
        )
    cache.advance(max(decoded.end, stored))
    return len(fresh)


def _decode_record(record: StoredRecord) -> ProjectedEvent:
    report = read_report(record)
    if report is not None:
        event_id = next(value for name, value in record.headers if name == "ce_id")
        return ProjectedEvent(report, cast("bytes", event_id).decode(), record.position, record.timestamp_ms)
    origin = first_origin(record.headers, record.position)
    return ProjectedEvent.of(
        record.decode(),
        record.position,
        logged_ms=record.timestamp_ms,
        origin=None if origin == record.position else origin,
    )


async def _lock_position(connection: Connection, batch: Batch, cache: PartitionCache) -> int:
    sql, where = queries("positions"), {"topic": batch.topic, "log_partition": batch.partition}
    row = await sql.lock_position(connection, **where)
    if row is None and batch.may_begin:
        await sql.insert_position(connection, **where, next_offset=batch.start)
        row = await sql.lock_position(connection, **where)
    if row is None:
        raise PositionError(
            f"{batch.topic}[{batch.partition}]: the projections hold no position any more, but the batch starts at "
            f"{batch.start}: a migration or an operator deleted it; restart the worker"
        )
    stored = int(row["next_offset"])
    if batch.start > stored:
        raise PositionError(
            f"{batch.topic}[{batch.partition}]: the projections end at offset {stored}, but the batch "
            f"starts at {batch.start}; run `esper projections rebuild`"
        )
    cache.validate(stored, row["live_table"])
    return stored


async def _without_redriven(
    connection: Connection, batch: Batch, events: Sequence[ProjectedEvent], cache: PartitionCache
) -> Sequence[ProjectedEvent]:
    """Drop redriven events that a redrive or a resend projected before, and record the others.

    A resend of an event that has a dead letter is treated as its redrive.
    """
    sql, where = queries("dead_letters"), {"topic": batch.topic, "log_partition": batch.partition}
    if cache.dead_letters is None:
        rows = sql.with_event_id(connection, **where)
        cache.dead_letters = {r["event_id"]: (r["log_offset"], r["is_projected"]) async for r in rows}
    if not cache.dead_letters and all(e.origin is None for e in events):
        return events
    fresh = []
    for projected in events:
        offset, was_projected = cache.dead_letters.get(projected.event_id, (None, False))
        if offset is not None and offset > projected.position.offset:
            offset = None  # a later record: the result must not depend on how the log was cut into batches
        origin = projected.origin
        if origin is None:
            if offset is None:
                fresh.append(projected)
                continue
            if was_projected:
                continue
            origin = projected.position._replace(offset=offset)
        inserted = await sql.insert_redriven(
            connection,
            **where,
            log_offset=origin.offset,
            redriven_offset=projected.position.offset,
            event_id=projected.event_id,
        )
        if inserted is not None:
            fresh.append(projected._replace(origin=origin))
            if offset is not None:
                cache.dead_letters[projected.event_id] = (offset, True)
    return fresh


async def _load_progress(
    connection: Connection, topic: str, events: Sequence[ProjectedEvent], cache: PartitionCache
) -> set[RunKey]:
    """Read the progress of the incarnations in these events into the cache; returns their keys."""
    of_trainers = cast("Iterable[TrainerEvent | HealthReport]", [e.data for e in events if e.is_trainers])
    keys = {(event.run_id, event.incarnation) for event in of_trainers}
    unknown = sorted({run_id for run_id, n in keys if (run_id, n) not in cache.progress})
    if unknown:
        async for r in queries("positions").progress_of(connection, topic=topic, run_ids=unknown):
            last_step = -1 if r["last_step"] is None else r["last_step"]
            cache.progress[r["run_id"], r["incarnation"]] = Progress(r["last_sequence"], last_step)
    for key in keys:
        cache.progress.setdefault(key, Progress())
    return keys


def _without_resends(events: Sequence[ProjectedEvent], cache: PartitionCache) -> list[ProjectedEvent]:
    """Drop trainer events that are not beyond the highest sequence seen, and raise that sequence.

    A redriven event is exempt: its origin makes it unique. If later events were projected before it, it is marked as
    late.
    """
    fresh = []
    for projected in events:
        if projected.is_trainers:
            event = cast("TrainerEvent | HealthReport", projected.data)
            progress = cache.progress[event.run_id, event.incarnation]
            if event.sequence > progress.last_sequence:
                progress.last_sequence = event.sequence
            elif projected.origin is None:
                continue
            else:
                projected = projected._replace(late_from=progress.last_sequence + 1)
        fresh.append(projected)
    return fresh


async def _record_progress(connection: Connection, topic: str, runs: set[RunKey], cache: PartitionCache) -> None:
    if not runs:
        return
    rows = sorted((run_id, n, cache.progress[run_id, n]) for run_id, n in runs)
    await queries("positions").upsert_progress(
        connection,
        topic=topic,
        run_ids=[run_id for run_id, _n, _progress in rows],
        incarnations=[n for _run_id, n, _progress in rows],
        last_sequences=[progress.last_sequence for _run_id, _n, progress in rows],
        last_steps=[progress.last_step if progress.last_step >= 0 else None for _run_id, _n, progress in rows],
    )
