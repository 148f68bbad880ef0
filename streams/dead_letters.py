"""Moves dead letters from Postgres to Kafka.

Invariant: a dead letter reaches Kafka only after the transaction that skipped its record was committed. So a stale
worker, or one that died in between, never sends a dead letter for a record that was projected, and a replay may skip
exactly the records that have one.
"""

from collections.abc import Sequence
from typing import Any

from esper.errors import ContractError, DecodeError
from esper.logging import get_logger
from esper.oona.dead_letters.dead_letter import PROJECTIONS, DeadLetter, dead_letter, read_dead_letter, stored_detail
from esper.oona.log_reader import StoredRecord
from esper.oona.producer import OonaProducer
from esper.oona.records import Position, Record, headers_from_json, headers_to_json
from esper.schemas.topics import DEAD_LETTER_SUFFIX
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import by_column, queries

MAX_SENT_AT_ONCE = 100
MAX_ID_CHARS = 200

_log = get_logger(__name__)

Undecodable = tuple[StoredRecord, DecodeError]


async def record_dead_letters(connection: Connection, undecodable: Sequence[Undecodable], *, to_be_sent: bool) -> None:
    """Record skipped records, in the transaction that moves the position past them."""
    if not undecodable:
        return
    sql = queries("dead_letters")
    rows = [
        {
            **_position_columns(record.position),
            "reason": error.reason,
            "detail": stored_detail(error),
            "event_id": event_id_of(record),
        }
        for record, error in undecodable
    ]
    await sql.insert_dead_letters(connection, **by_column(rows))
    if to_be_sent:
        await sql.insert_pending(connection, **by_column([_pending_row(*one) for one in undecodable]))


async def send_pending_dead_letters(connection: Connection, topic: str, partition: int, producer: OonaProducer) -> None:
    """Send the pending dead letters of a partition. Idempotent: a duplicate has the same origin.

    A dead letter that Kafka can never accept (the record of another client may exceed our size limit) stays in
    ``pending_letters`` with the reason, and does not block the others.

    Raises:
        UnavailableError, NotAllowedError: Kafka did not accept them; they stay pending.
    """
    sql, where = queries("dead_letters"), {"topic": topic, "log_partition": partition}
    while rows := [row async for row in sql.pending(connection, **where, limit=MAX_SENT_AT_ONCE)]:
        deliveries = await producer.deliver([_record(row) for row in rows])
        offsets = [r["log_offset"] for r, d in zip(rows, deliveries, strict=True) if d.position is not None]
        await sql.delete_pending(connection, **where, offsets=offsets)
        for row, delivery in zip(rows, deliveries, strict=True):
            if isinstance(delivery.error, ContractError):
                reason = str(delivery.error)
                await sql.mark_refused(connection, **where, log_offset=row["log_offset"], reason=reason)
                _log.error("dead_letter.refused", **where, offset=row["log_offset"], reason=reason)
            elif delivery.error is not None:
                raise delivery.error


def event_id_of(record: StoredRecord) -> str | None:
    """The event id in the headers of a record; None if there is none that can be stored."""
    ids = [value for name, value in record.headers if name == "ce_id" and value is not None]
    text = ids[-1].decode(errors="replace") if ids else ""
    return text if 0 < len(text) <= MAX_ID_CHARS and text.isprintable() else None


async def pending_dead_letters(connection: Connection) -> list[StoredRecord]:
    """The dead letters that are not in Kafka yet, as the records that they will be there (with offset -1)."""
    return [
        StoredRecord(
            Position(row["topic"] + DEAD_LETTER_SUFFIX, row["log_partition"], -1),
            row["key"],
            row["value"],
            headers_from_json(row["headers"]),
            row["timestamp_ms"],
        )
        async for row in queries("dead_letters").all_pending(connection)
    ]


def projection_dead_letter(stored: StoredRecord) -> DeadLetter | None:
    """The dead letter in a record of a dead-letter topic, if a stream worker wrote it; None for any other record.

    Other consumer groups skip other records, so their dead letters do not apply to the projections.
    """
    try:
        letter = read_dead_letter(stored)
    except ContractError:
        return None
    return letter if letter.reader == PROJECTIONS else None


def _position_columns(position: Position) -> dict[str, Any]:
    return {"topic": position.topic, "log_partition": position.partition, "log_offset": position.offset}


def _pending_row(record: StoredRecord, error: DecodeError) -> dict[str, Any]:
    letter = dead_letter(record, error, PROJECTIONS)
    return {
        **_position_columns(record.position),
        "key": letter.key,
        "value": letter.value,
        "headers": headers_to_json(letter.headers),
        "timestamp_ms": letter.timestamp_ms,
    }


def _record(row: Any) -> Record:
    topic, partition = row["topic"] + DEAD_LETTER_SUFFIX, row["log_partition"]
    return Record(topic, row["key"], row["value"], headers_from_json(row["headers"]), row["timestamp_ms"], partition)
