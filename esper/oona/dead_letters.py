"""Dead letters: records that cannot be decoded, kept byte for byte with the reason and the origin.

A letter lies in the partition of the same number as its origin, and in the origins' order. Letters are
sent again by a redrive: the record as it was, to the topic that it was meant for, with the origin
named in a header, so that every reader handles it once.
"""

import traceback
from datetime import UTC, datetime
from typing import NamedTuple

from esper.errors import ContractError, DecodeError
from esper.oona.consumer import StoredRecord
from esper.oona.records import Headers, Position, Record
from esper.schemas.topics import DEAD_LETTER_SUFFIX

PREFIX = "esper_dlq_"
FIRST = PREFIX + "reason"  # where what is ours begins among the headers
ORIGIN = "esper_redrive_origin"
ATTEMPTS = "esper_redrive_attempts"
MAX_TEXT_BYTES = 2_000
MAX_TRACE_BYTES = 4_000


class DeadLetter(NamedTuple):
    """A letter as it lies in the log: the record that could not be decoded, and why.

    ``origin`` is where that record lies; ``first_origin`` where it lay before it was redriven for the
    first time (the same, where it never was). ``attempts`` counts how often it was tried.
    """

    position: Position
    origin: Position
    first_origin: Position
    attempts: int
    reason: str
    detail: str
    error: str
    trace: str
    at: str
    record: StoredRecord


def dead_letter(origin: StoredRecord, error: DecodeError) -> Record:
    """The dead letter of a record: same key, value and headers, and on top why and whence.

    The new headers are ``esper_dlq_`` reason, detail, error (its class), trace, topic, partition,
    offset, attempts and at.
    """
    where = origin.position
    added = {
        "reason": error.reason,
        "detail": told(error),
        "error": type(error).__name__,
        "trace": "".join(traceback.format_exception(error)),
        "topic": where.topic,
        "partition": str(where.partition),
        "offset": str(where.offset),
        "attempts": str(_attempts(origin.headers) + 1),
        "at": datetime.now(UTC).isoformat(),
    }
    limits = {"trace": MAX_TRACE_BYTES}
    headers = tuple((PREFIX + n, _cut(text, limits.get(n, MAX_TEXT_BYTES))) for n, text in added.items())
    return Record(
        topic=where.topic + DEAD_LETTER_SUFFIX,
        key=origin.key,
        value=origin.value,
        headers=origin.headers + headers,
        timestamp_ms=origin.timestamp_ms,
        partition=where.partition,
    )


def told(error: DecodeError) -> str:
    """The error's detail as it is kept: bounded, and without the NUL that Postgres refuses."""
    return _cut(error.detail.replace("\x00", "\\0"), MAX_TEXT_BYTES).decode()


def read_letter(stored: StoredRecord) -> DeadLetter:
    """What a record of a dead-letter topic says.

    Raises:
        ContractError: it is not one of ours.
    """
    start = max((n for n, (name, _text) in enumerate(stored.headers) if name == FIRST), default=None)
    if start is None:
        raise ContractError(f"{stored.position} has no {FIRST} header: no dead letter of Esper's")
    own = {n.removeprefix(PREFIX): (text or b"").decode(errors="replace") for n, text in stored.headers[start:]}
    try:
        origin = Position(own["topic"], int(own["partition"]), int(own["offset"]))
        record = stored._replace(position=origin, headers=stored.headers[:start])
        return DeadLetter(
            position=stored.position,
            origin=origin,
            first_origin=origin_of(record.headers) or origin,
            attempts=int(own["attempts"]),
            record=record,
            **{name: own.get(name, "") for name in ("reason", "detail", "error", "trace", "at")},
        )
    except (KeyError, ValueError) as error:
        raise ContractError(f"{stored.position} has broken {PREFIX} headers: {error!r}") from None


def redriven(letter: DeadLetter) -> Record:
    """The record of a letter, for the topic and partition that it was meant for, with its first origin named."""
    kept = tuple((n, text) for n, text in letter.record.headers if n not in (ORIGIN, ATTEMPTS))
    first = letter.first_origin
    added = {ORIGIN: f"{first.topic}/{first.partition}/{first.offset}", ATTEMPTS: str(letter.attempts)}
    return Record(
        topic=first.topic,
        key=letter.record.key,
        value=letter.record.value,
        headers=kept + tuple((n, text.encode()) for n, text in added.items()),
        timestamp_ms=letter.record.timestamp_ms,
        partition=first.partition,
    )


def origin_of(headers: Headers) -> Position | None:
    """The first origin of a record that was redriven; None for any other."""
    named = [text for name, text in headers if name == ORIGIN and text is not None]
    parts = named[-1].decode(errors="replace").rsplit("/", 2) if named else []
    if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
        return Position(parts[0], int(parts[1]), int(parts[2]))
    return None


def _attempts(headers: Headers) -> int:
    named = [text for name, text in headers if name == ATTEMPTS and text is not None]
    return int(named[-1]) if named and named[-1].isdigit() else 0


def _cut(text: str, limit: int) -> bytes:
    """UTF-8 of at most ``limit`` bytes, cut between characters; what is no character becomes its escape."""
    return text.encode(errors="backslashreplace")[:limit].decode(errors="ignore").encode()
