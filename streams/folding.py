"""Folds one batch of one partition into the projections, effectively once.

The order is the design:
1. decode every record; what cannot be decoded is set aside with its reason;
2. send the dead letters (again, after a crash: readers know them by their origin);
3. in one transaction: lock the partition's position; drop what lies below it; refuse a gap;
   drop resends by their sequence; project; move the position past the batch.
A newer version of a known type ends the batch before it and stops the partition.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from esper.errors import DecodeError, NewerVersionError, PositionError
from esper.oona.consumer import StoredRecord
from esper.oona.dead_letters import dead_letter
from esper.oona.records import Record
from esper.schemas.events import TrainerEvent
from esper.streams.projected import Projected
from esper.streams.projectors import PROJECTORS
from esper.streams.queries import queries

SendRecords = Callable[[Sequence[Record]], Awaitable[object]]


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
    broken: tuple[tuple[StoredRecord, DecodeError], ...]
    end: int
    newer: NewerVersionError | None


def decode_batch(batch: Batch) -> Decoded:
    """Decode records up to the first that needs a newer program."""
    events: list[Projected] = []
    broken: list[tuple[StoredRecord, DecodeError]] = []
    for record in batch.records:
        try:
            events.append(Projected(record.decode(), record.position))
        except DecodeError as error:
            broken.append((record, error))
        except NewerVersionError as error:
            return Decoded(tuple(events), tuple(broken), record.position.offset, error)
    return Decoded(tuple(events), tuple(broken), batch.end, None)


async def fold(connection: Any, batch: Batch, send: SendRecords) -> int:
    """Fold a batch. Doing it again, in whole or in part, changes nothing.

    Returns:
        The number of events that were new.

    Raises:
        PositionError: the batch starts beyond the stored position.
        NewerVersionError: after all before it was folded.
    """
    decoded = decode_batch(batch)
    if decoded.broken:
        await send([dead_letter(record, error) for record, error in decoded.broken])
    async with connection.transaction():
        stored = await _lock_position(connection, batch)
        events = [e for e in decoded.events if e.position.offset >= stored]
        fresh = await _without_resends(connection, batch.topic, events)
        if fresh:
            await PROJECTORS[batch.topic](connection, fresh)
        await _note_dead_letters(connection, decoded, stored)
        if decoded.end > stored:
            await queries("positions").move_position(
                connection, topic=batch.topic, log_partition=batch.partition, next_offset=decoded.end
            )
    if decoded.newer is not None:
        raise decoded.newer
    return len(fresh)


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


async def _without_resends(connection: Any, topic: str, events: Sequence[Projected]) -> list[Projected]:
    """Drop trainers' events that are not beyond the highest sequence seen, and note the new one."""
    sql = queries("positions")
    run_ids = sorted({e.message.data.run_id for e in events if isinstance(e.message.data, TrainerEvent)})
    if not run_ids:
        return list(events)
    rows = sql.progress_of(connection, topic=topic, run_ids=run_ids)
    highest = {(r["run_id"], r["incarnation"]): r["last_sequence"] async for r in rows}
    fresh = []
    for projected in events:
        event = projected.message.data
        if isinstance(event, TrainerEvent):
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


async def _note_dead_letters(connection: Any, decoded: Decoded, stored: int) -> None:
    rows = [
        {
            "topic": record.position.topic,
            "log_partition": record.position.partition,
            "log_offset": record.position.offset,
            "reason": error.reason,
            "detail": error.detail.replace("\x00", "\\0"),
        }
        for record, error in decoded.broken
        if record.position.offset >= stored
    ]
    if rows:
        await queries("positions").note_dead_letter(connection, rows)
