"""Folds one batch of one partition into the projections, effectively once.

The order is the design:
1. decode every record; what cannot be decoded is set aside with its reason;
2. in one transaction: lock the partition's position; drop what lies below it; refuse a gap; note what
   was set aside, with its letter; drop redriven records whose event was folded, and resends by their
   sequence; project; move the position past the batch;
3. the caller sends the letters (``esper.streams.letters``).
A newer version of a known type ends the batch before it and stops the partition.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from esper.errors import DecodeError, NewerVersionError, PositionError
from esper.oona.consumer import StoredRecord
from esper.oona.dead_letters import first_origin
from esper.oona.records import Position
from esper.schemas.events import TrainerEvent
from esper.streams.letters import Broken, note_letters
from esper.streams.projected import Projected
from esper.streams.projectors import PROJECTORS
from esper.streams.queries import queries

NO_LETTERS: Mapping[Position, DecodeError] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive records of one partition.

    ``start`` is where the reader stood before it fetched them. Offsets may be missing in
    between (expired records, transaction markers); that is no gap.
    """

    topic: str
    partition: int
    start: int
    records: tuple[StoredRecord, ...]

    @property
    def end(self) -> int:
        """The offset to go on from."""
        return self.records[-1].position.offset + 1 if self.records else self.start


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding made of a batch: ``end`` is where a newer version cut it short."""

    events: tuple[Projected, ...]
    broken: tuple[Broken, ...]
    end: int
    newer: NewerVersionError | None


@dataclass(frozen=True, slots=True)
class Folded:
    """What folding did: events that were new, whether letters may wait to be sent, and what the transaction took."""

    num_events: int
    has_letters: bool
    transaction_s: float


def decode_batch(batch: Batch, skipped: Mapping[Position, DecodeError] = NO_LETTERS) -> Decoded:
    """Decode records up to the first that needs a newer program.

    Args:
        skipped: records that count as broken whatever is in them, and why.
    """
    events: list[Projected] = []
    broken: list[Broken] = []
    for record in batch.records:
        try:
            if record.position in skipped:
                raise skipped[record.position]
            events.append(Projected(record.decode(), record.position, _origin(record)))
        except DecodeError as error:
            broken.append((record, error))
        except NewerVersionError as error:
            return Decoded(tuple(events), tuple(broken), record.position.offset, error)
    return Decoded(tuple(events), tuple(broken), batch.end, None)


async def fold(connection: Any, batch: Batch, replayed: Mapping[Position, DecodeError] | None = None) -> Folded:
    """Fold a batch. Doing it again, in whole or in part, changes nothing.

    Args:
        replayed: in a replay, the records that live workers passed over; no letter is written then.

    Raises:
        PositionError: the batch starts beyond the stored position.
        NewerVersionError: after all before it was folded.
    """
    decoded, began = decode_batch(batch, replayed or NO_LETTERS), time.perf_counter()
    async with connection.transaction():
        stored = await _lock_position(connection, batch)
        events = [e for e in decoded.events if e.position.offset >= stored]
        broken = [b for b in decoded.broken if b[0].position.offset >= stored]
        await note_letters(connection, broken, to_be_sent=replayed is None)  # a redrive may follow in this batch
        fresh = await _without_resends(connection, batch.topic, await _without_redriven(connection, batch, events))
        if fresh:
            await PROJECTORS[batch.topic](connection, fresh)
        if decoded.end > stored:
            await queries("positions").move_position(
                connection, topic=batch.topic, log_partition=batch.partition, next_offset=decoded.end
            )
    if decoded.newer is not None:
        raise decoded.newer
    return Folded(len(fresh), bool(decoded.broken), time.perf_counter() - began)


def _origin(record: StoredRecord) -> Position | None:
    """Where a redriven record lay first; None for any other."""
    origin = first_origin(record.headers, record.position)
    return None if origin == record.position else origin


async def _lock_position(connection: Any, batch: Batch) -> int:
    sql, where = queries("positions"), {"topic": batch.topic, "log_partition": batch.partition}
    await sql.claim_position(connection, **where, next_offset=batch.start)
    stored = int((await sql.lock_position(connection, **where))["next_offset"])
    if batch.start > stored:
        raise PositionError(
            f"{batch.topic}[{batch.partition}]: the projections end at offset {stored}, but the batch "
            f"starts at {batch.start}; run `esper projections rebuild`"
        )
    return stored


async def _without_redriven(connection: Any, batch: Batch, events: Sequence[Projected]) -> list[Projected]:
    """Drop redriven records whose event was folded before, by a redrive or a resend, and note the others.

    A resend of an event that has a letter is folded, and settles the letter.
    """
    sql, where = queries("letters"), {"topic": batch.topic, "log_partition": batch.partition}
    letters: Any = {r["event_id"]: r async for r in sql.letters_of(connection, **where)}
    fresh = []
    for projected in events:
        event_id, origin = str(projected.message.id), projected.origin
        letter = letters.get(event_id)
        if letter is not None and letter["log_offset"] > projected.position.offset:
            letter = None  # of later on: how the log was cut into batches must not matter
        if letter is None and origin is None:
            fresh.append(projected)
            continue
        if origin is None and letter["is_folded"]:
            continue
        noted = await sql.note_redriven(
            connection,
            **where,
            log_offset=letter["log_offset"] if origin is None else origin.offset,
            redriven_offset=projected.position.offset,
            event_id=event_id,
        )
        if noted is not None:
            fresh.append(projected)
    return fresh


async def _without_resends(connection: Any, topic: str, events: Sequence[Projected]) -> list[Projected]:
    """Drop trainers' events that are not beyond the highest sequence seen, and note the new one.

    A redriven event is not measured by its sequence: it comes late by nature, and once by its origin.
    """
    sql = queries("positions")
    run_ids = sorted({e.message.data.run_id for e in events if isinstance(e.message.data, TrainerEvent)})
    if not run_ids:
        return list(events)
    rows = sql.progress_of(connection, topic=topic, run_ids=run_ids)
    highest = {(r["run_id"], r["incarnation"]): r["last_sequence"] async for r in rows}
    fresh = []
    for projected in events:
        event = projected.message.data
        if isinstance(event, TrainerEvent) and projected.origin is None:
            key = (event.run_id, event.incarnation)
            if event.sequence <= highest.get(key, -1):
                continue
            highest[key] = event.sequence
        fresh.append(projected)
    await sql.note_progress(
        connection,
        [
            {"run_id": run_id, "incarnation": n, "topic": topic, "last_sequence": last}
            for (run_id, n), last in sorted(highest.items())
        ],
    )
    return fresh
