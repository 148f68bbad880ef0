"""Dead letters between Postgres and Kafka.

Invariant: a letter is in Kafka only if the transaction that passed over its record was committed. So
a stale worker, or one that died half way, can never put a letter beside a record that was folded; and
a replay may skip exactly the records that have a letter.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any

from esper.errors import ContractError, DecodeError
from esper.logging import get_logger
from esper.oona.dead_letters.dead_letter import PROJECTIONS, DeadLetter, dead_letter, read_letter, told
from esper.oona.log_reader import StoredRecord
from esper.oona.producer import OonaProducer
from esper.oona.records import Headers, Position, Record
from esper.schemas.topics import DEAD_LETTER_SUFFIX
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import by_column, queries

SEND_AT_ONCE = 100
MAX_ID_CHARS = 200

_log = get_logger(__name__)

Broken = tuple[StoredRecord, DecodeError]


async def record_dead_letters(connection: Connection, broken: Sequence[Broken], *, to_be_sent: bool) -> None:
    """Note records that were passed over, in the transaction that passes over them."""
    sql = queries("dead_letters")
    rows = [
        {**_place(r.position), "reason": e.reason, "detail": told(e), "event_id": event_id_of(r)} for r, e in broken
    ]
    if rows:
        await sql.note_dead_letters(connection, **by_column(rows))
    if rows and to_be_sent:
        await sql.add_pending(connection, **by_column([_pending_row(record, error) for record, error in broken]))


async def send_pending_dead_letters(connection: Connection, topic: str, partition: int, producer: OonaProducer) -> None:
    """Send the letters of a partition that wait. Sending one twice does no harm: its origin tells.

    One that Kafka will never take (another client's record can be larger than any of ours) stays in
    ``pending_letters`` with the reason, and holds nothing up.

    Raises:
        UnavailableError, NotAllowedError: Kafka did not take them; they still wait.
    """
    sql, where = queries("dead_letters"), {"topic": topic, "log_partition": partition}
    while rows := [row async for row in sql.pending(connection, **where, limit=SEND_AT_ONCE)]:
        deliveries = await producer.deliver([_record(row) for row in rows])
        offsets = [r["log_offset"] for r, d in zip(rows, deliveries, strict=True) if d.position is not None]
        await sql.remove_pending(connection, **where, offsets=offsets)
        for row, delivery in zip(rows, deliveries, strict=True):
            if isinstance(delivery.error, ContractError):
                told_why = str(delivery.error)
                await sql.refuse_pending(connection, **where, log_offset=row["log_offset"], reason=told_why)
                _log.error("dead_letter.refused", **where, offset=row["log_offset"], reason=told_why)
            elif delivery.error is not None:
                raise delivery.error


def event_id_of(record: StoredRecord) -> str | None:
    """Which event a record says it is; None where it does not say, or not in a form that can be kept."""
    named = [text for name, text in record.headers if name == "ce_id" and text is not None]
    text = named[-1].decode(errors="replace") if named else ""
    return text if 0 < len(text) <= MAX_ID_CHARS and text.isprintable() else None


async def pending_dead_letters(connection: Connection) -> list[StoredRecord]:
    """The letters that are not in Kafka yet, in the form that they will have there (without an offset)."""
    return [
        StoredRecord(
            Position(row["topic"] + DEAD_LETTER_SUFFIX, row["log_partition"], -1),
            row["key"],
            row["value"],
            _headers(row["headers"]),
            row["timestamp_ms"],
        )
        async for row in queries("dead_letters").all_pending(connection)
    ]


def skipped_record(stored: StoredRecord) -> DeadLetter | None:
    """The letter in a record of a dead-letter topic, if a stream worker wrote it.

    None for another group's, which says nothing of what the projections read, and for anything else.
    """
    try:
        letter = read_letter(stored)
    except ContractError:
        return None
    return letter if letter.reader == PROJECTIONS else None


def _place(position: Position) -> dict[str, Any]:
    return {"topic": position.topic, "log_partition": position.partition, "log_offset": position.offset}


def _pending_row(record: StoredRecord, error: DecodeError) -> dict[str, Any]:
    letter = dead_letter(record, error, PROJECTIONS)
    headers = [[n, None if t is None else base64.b64encode(t).decode()] for n, t in letter.headers]
    return {
        **_place(record.position),
        "key": letter.key,
        "value": letter.value,
        "headers": json.dumps(headers),
        "timestamp_ms": letter.timestamp_ms,
    }


def _record(row: Any) -> Record:
    topic, partition = row["topic"] + DEAD_LETTER_SUFFIX, row["log_partition"]
    return Record(topic, row["key"], row["value"], _headers(row["headers"]), row["timestamp_ms"], partition)


def _headers(text: str) -> Headers:
    return tuple((n, None if t is None else base64.b64decode(t)) for n, t in json.loads(text))
