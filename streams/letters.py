"""Dead letters between Postgres and Kafka.

Invariant: a letter is in Kafka only if the transaction that passed over its record was committed. So
a stale worker, or one that died half way, can never put a letter beside a record that was folded; and
a replay may skip exactly the records that have a letter.
"""

import base64
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from esper.config import KafkaSettings
from esper.errors import ContractError, DecodeError
from esper.oona.consumer import StoredRecord, read_range
from esper.oona.dead_letters import dead_letter, read_letter, told
from esper.oona.records import Headers, Position, Record
from esper.schemas.topics import DEAD_LETTER_SUFFIX, TOPICS
from esper.streams.queries import queries

SEND_AT_ONCE = 500

SendRecords = Callable[[Sequence[Record]], Awaitable[object]]
Broken = tuple[StoredRecord, DecodeError]


async def note_letters(connection: Any, broken: Sequence[Broken], *, to_be_sent: bool) -> None:
    """Note records that were passed over, in the transaction that passes over them."""
    sql = queries("letters")
    rows = [{**_place(r.position), "reason": e.reason, "detail": told(e)} for r, e in broken]
    if rows:
        await sql.note_dead_letter(connection, rows)
    if rows and to_be_sent:
        await sql.add_pending(connection, [_pending_row(record, error) for record, error in broken])


async def send_pending(connection: Any, topic: str, partition: int, send: SendRecords) -> int:
    """Send the letters of a partition that wait. Sending one twice does no harm: its origin tells.

    Raises:
        UnavailableError: Kafka did not take them; they still wait.
    """
    sql, where, count = queries("letters"), {"topic": topic, "log_partition": partition}, 0
    while rows := [row async for row in sql.pending(connection, **where, limit=SEND_AT_ONCE)]:
        await send([_record(row) for row in rows])
        await sql.remove_pending(connection, **where, log_offset=rows[-1]["log_offset"])
        count += len(rows)
    return count


async def known_letters(connection: Any, kafka: KafkaSettings) -> Mapping[Position, DecodeError]:
    """Every record that a worker passed over, and why: what a replay has to skip.

    Args:
        connection: sees the live projections, for the letters that are not in Kafka yet.
    """
    known: dict[Position, DecodeError] = {}
    for spec in TOPICS:
        async for stored in read_range(kafka, spec.dead_letters):
            _learn(known, stored)
    async for row in queries("letters").all_pending(connection):
        position = Position(row["topic"] + DEAD_LETTER_SUFFIX, row["log_partition"], -1)
        _learn(known, StoredRecord(position, row["key"], row["value"], _headers(row["headers"]), 0))
    return known


def _learn(known: dict[Position, DecodeError], stored: StoredRecord) -> None:
    try:
        letter = read_letter(stored)
    except ContractError:
        return  # somebody else's record among the letters
    known.setdefault(letter.origin, DecodeError(letter.reason, letter.detail))


def _place(position: Position) -> dict[str, Any]:
    return {"topic": position.topic, "log_partition": position.partition, "log_offset": position.offset}


def _pending_row(record: StoredRecord, error: DecodeError) -> dict[str, Any]:
    letter = dead_letter(record, error)
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
