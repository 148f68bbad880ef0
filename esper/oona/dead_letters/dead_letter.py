"""Dead letters: records that cannot be decoded, kept byte for byte with the reason and the origin.

A letter lies in the partition of the same number as its origin, and in the origins' order. Letters are
sent again by a redrive: the record as it was, to the topic that it was meant for, with the origin
named in a header, so that every reader handles it once.
"""

import re
import traceback
from datetime import UTC, datetime
from typing import NamedTuple

from esper.errors import ContractError, DecodeError
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Headers, Position, Record
from esper.schemas.topics import DEAD_LETTER_SUFFIX

PREFIX = "esper_dlq_"
FIRST = PREFIX + "reason"  # where what is ours begins among the headers
PROJECTIONS = "projections"  # the reader whose letters a replay skips: the stream workers
ORIGIN = "esper_redrive_origin"
ATTEMPTS = "esper_redrive_attempts"
MAX_TEXT_BYTES = 2_000
MAX_TRACE_BYTES = 4_000

_ORIGIN = re.compile(r"(?P<topic>[^/]{1,249})/(?P<partition>[0-9]{1,9})/(?P<offset>[0-9]{1,18})")
_NUMBER = re.compile(r"[0-9]{1,18}")


class DeadLetter(NamedTuple):
    """A letter as it lies in the log: the record that could not be decoded, and why.

    ``origin`` is where that record lies; ``first_origin`` where it lay before it was redriven for the
    first time (the same, where it never was). ``attempts`` counts how often it was tried; ``reader`` is
    who could not read it.
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
    reader: str
    record: StoredRecord


def dead_letter(origin: StoredRecord, error: DecodeError, reader: str) -> Record:
    """The dead letter of a record: same key, value and headers, and on top why and whence.

    The new headers are ``esper_dlq_`` reason, detail, error (its class), trace, topic, partition,
    offset, attempts, at and reader.
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
        "reader": reader,
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


def reason_of(letter: Record) -> str:
    """The reason that a letter of ours gives."""
    named = [text for name, text in letter.headers if name == FIRST and text is not None]
    return named[-1].decode(errors="replace") if named else "unknown"


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
    place, here = (own.get("topic"), own.get("partition")), stored.position
    numbers = (own.get("offset", ""), own.get("attempts", ""))
    if place != (here.topic.removesuffix(DEAD_LETTER_SUFFIX), str(here.partition)) or not all(
        map(_NUMBER.fullmatch, numbers)
    ):
        raise ContractError(f"{here} has {PREFIX} headers that do not belong here")
    origin = Position(here.topic.removesuffix(DEAD_LETTER_SUFFIX), here.partition, int(numbers[0]))
    record = stored._replace(position=origin, headers=stored.headers[:start])
    return DeadLetter(
        position=here,
        origin=origin,
        first_origin=first_origin(record.headers, origin),
        attempts=int(numbers[1]),
        record=record,
        **{name: own.get(name, "") for name in ("reason", "detail", "error", "trace", "at", "reader")},
    )


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


def first_origin(headers: Headers, here: Position) -> Position:
    """Where the record at ``here`` lay before it was redriven, as its header says; ``here`` itself for any other.

    A header that names no earlier place of the same partition was not written by a redrive, and is ignored.
    """
    named = [text for name, text in headers if name == ORIGIN and text is not None]
    found = _ORIGIN.fullmatch(named[-1].decode(errors="replace")) if named else None
    if found is None or (found["topic"], int(found["partition"])) != here[:2] or int(found["offset"]) >= here.offset:
        return here
    return here._replace(offset=int(found["offset"]))


def _attempts(headers: Headers) -> int:
    named = [text.decode(errors="replace") for name, text in headers if name == ATTEMPTS and text is not None]
    return int(named[-1]) if named and _NUMBER.fullmatch(named[-1]) else 0


def _cut(text: str, limit: int) -> bytes:
    """UTF-8 of at most ``limit`` bytes, cut between characters; what is no character becomes its escape."""
    return text.encode(errors="backslashreplace")[:limit].decode(errors="ignore").encode()
