"""Folds one batch of one partition into the projections, effectively once.

The order is the design:
1. decode every record; what cannot be decoded is set aside with its reason;
2. in one transaction: lock the partition's position; drop what lies below it; refuse a gap; note what
   was set aside, with its letter; drop redriven records whose event was folded, and resends by their
   sequence; project; note how far each run is; move the position past the batch;
3. the caller sends the letters (``esper.streams.dead_letters``).
A newer version of a known type ends the batch before it and stops the partition. What was remembered of
the partition is forgotten whenever the transaction did not end well.
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
from esper.streams.dead_letters import Broken, record_dead_letters
from esper.streams.projectors import PROJECTORS
from esper.streams.projectors.health_report_decoder import HealthReport, read_report
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import PartitionCache, Progress, RunKey

NO_LETTERS: Mapping[Position, DecodeError] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive records of one partition.

    ``start`` is where the reader stood before it fetched them. Offsets may be missing in
    between (expired records, transaction markers); that is no gap. ``may_begin`` says that a
    partition without a stored position may begin here, since the log does.
    """

    topic: str
    partition: int
    start: int
    records: tuple[StoredRecord, ...]
    may_begin: bool = True

    @property
    def end(self) -> int:
        """The offset to go on from."""
        return self.records[-1].position.offset + 1 if self.records else self.start


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """What decoding made of a batch: ``end`` is where a newer version cut it short."""

    events: tuple[ProjectedEvent, ...]
    broken: tuple[Broken, ...]
    end: int
    newer: NewerVersionError | None


@dataclass(frozen=True, slots=True)
class ProjectedBatch:
    """What folding did: events that were new, whether letters may wait to be sent, and what the transaction took."""

    num_events: int
    has_letters: bool
    transaction_s: float


def decode_batch(batch: Batch, skipped: Mapping[Position, DecodeError] = NO_LETTERS) -> DecodedBatch:
    """Decode records up to the first that needs a newer program.

    Args:
        skipped: records that count as broken whatever is in them, and why.
    """
    events: list[ProjectedEvent] = []
    broken: list[Broken] = []
    for record in batch.records:
        try:
            if skipped and record.position in skipped:
                raise skipped[record.position]
            events.append(_projected(record))
        except DecodeError as error:
            broken.append((record, error))
        except NewerVersionError as error:
            return DecodedBatch(tuple(events), tuple(broken), record.position.offset, error)
    return DecodedBatch(tuple(events), tuple(broken), batch.end, None)


async def project_batch(
    connection: Connection,
    batch: Batch,
    replayed: Mapping[Position, DecodeError] | None = None,
    cache: PartitionCache | None = None,
) -> ProjectedBatch:
    """Fold a batch. Doing it again, in whole or in part, changes nothing.

    Args:
        replayed: in a replay, the records that live workers passed over; no letter is written then.
        memory: what the same reader remembers of this partition; without one everything is read anew.

    Raises:
        PositionError: the batch starts beyond the stored position.
        NewerVersionError: after all before it was folded.
    """
    decoded, began = decode_batch(batch, replayed or NO_LETTERS), time.perf_counter()
    cache = cache if cache is not None else PartitionCache()
    try:
        async with connection.transaction():
            fresh = await _fold_decoded(connection, batch, decoded, cache, to_be_sent=replayed is None)
    except BaseException:
        cache.forget()
        raise
    if decoded.newer is not None:
        raise decoded.newer
    return ProjectedBatch(fresh, bool(decoded.broken), time.perf_counter() - began)


async def _fold_decoded(
    connection: Connection, batch: Batch, decoded: DecodedBatch, cache: PartitionCache, *, to_be_sent: bool
) -> int:
    """The transaction; gives the number of events that were new."""
    stored = await _lock_position(connection, batch, cache)
    events: Sequence[ProjectedEvent] = decoded.events
    if batch.records and batch.records[0].position.offset < stored:
        events = [e for e in events if e.position.offset >= stored]
    broken = [b for b in decoded.broken if b[0].position.offset >= stored]
    if broken:
        await record_dead_letters(connection, broken, to_be_sent=to_be_sent)  # a redrive may follow in this batch
        cache.letters = None
    fresh = await _without_redriven(connection, batch, events, cache)
    runs = await _load_progress(connection, batch.topic, fresh, cache)
    fresh = _without_resends(fresh, cache)
    if fresh:
        await PROJECTORS[batch.topic](connection, fresh, cache)
    await _note_progress(connection, batch.topic, runs, cache)
    if decoded.end > stored:
        await queries("positions").move_position(
            connection, topic=batch.topic, log_partition=batch.partition, next_offset=decoded.end
        )
    cache.reached(max(decoded.end, stored))
    return len(fresh)


def _projected(record: StoredRecord) -> ProjectedEvent:
    report = read_report(record)
    if report is not None:
        name = next(value for header, value in record.headers if header == "ce_id")
        return ProjectedEvent(report, cast("bytes", name).decode(), record.position, record.timestamp_ms)
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
        await sql.claim_position(connection, **where, next_offset=batch.start)
        row = await sql.lock_position(connection, **where)
    if row is None:
        raise PositionError(
            f"{batch.topic}[{batch.partition}]: the projections hold no position any more, but the batch starts at "
            f"{batch.start}: a migration or somebody else removed it; restart the worker"
        )
    stored = int(row["next_offset"])
    if batch.start > stored:
        raise PositionError(
            f"{batch.topic}[{batch.partition}]: the projections end at offset {stored}, but the batch "
            f"starts at {batch.start}; run `esper projections rebuild`"
        )
    cache.stand_at(stored, row["live_table"])
    return stored


async def _without_redriven(
    connection: Connection, batch: Batch, events: Sequence[ProjectedEvent], cache: PartitionCache
) -> Sequence[ProjectedEvent]:
    """Drop redriven records whose event was folded before, by a redrive or a resend, and note the others.

    A resend of an event that has a letter is folded as if it were redriven, and settles the letter.
    """
    sql, where = queries("dead_letters"), {"topic": batch.topic, "log_partition": batch.partition}
    if cache.letters is None:
        rows = sql.letters_of(connection, **where)
        cache.letters = {r["event_id"]: (r["log_offset"], r["is_folded"]) async for r in rows}
    if not cache.letters and all(e.origin is None for e in events):
        return events
    fresh = []
    for projected in events:
        letter = cache.letters.get(projected.event_id)
        if letter is not None and letter[0] > projected.position.offset:
            letter = None  # of later on: how the log was cut into batches must not matter
        if letter is None and projected.origin is None:
            fresh.append(projected)
            continue
        if projected.origin is None and letter is not None and letter[1]:
            continue
        origin = projected.origin or projected.position._replace(offset=letter[0])  # type: ignore[index]
        noted = await sql.note_redriven(
            connection,
            **where,
            log_offset=origin.offset,
            redriven_offset=projected.position.offset,
            event_id=projected.event_id,
        )
        if noted is not None:
            fresh.append(projected._replace(origin=origin))
            if letter is not None:
                cache.letters[projected.event_id] = (letter[0], True)
    return fresh


async def _load_progress(
    connection: Connection, topic: str, events: Sequence[ProjectedEvent], cache: PartitionCache
) -> set[RunKey]:
    """How far the trainers' runs in these events are, as far as it is not remembered; gives the runs."""
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
    """Drop trainers' events that are not beyond the highest sequence seen, and remember the new one.

    A redriven event is not dropped for its sequence: it comes late by nature, and once by its origin. Where
    later ones were folded before it, it is marked as late.
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


async def _note_progress(connection: Connection, topic: str, runs: set[RunKey], cache: PartitionCache) -> None:
    if not runs:
        return
    rows = sorted((run_id, n, cache.progress[run_id, n]) for run_id, n in runs)
    await queries("positions").note_progress(
        connection,
        topic=topic,
        run_ids=[run_id for run_id, _n, _progress in rows],
        incarnations=[n for _run_id, n, _progress in rows],
        last_sequences=[progress.last_sequence for _run_id, _n, progress in rows],
        last_steps=[progress.last_step if progress.last_step >= 0 else None for _run_id, _n, progress in rows],
    )
