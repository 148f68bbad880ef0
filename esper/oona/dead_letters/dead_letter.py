"""Dead letters: records that cannot be decoded, kept byte for byte with the reason and the origin.

A dead letter is in the partition with the same number as its origin, in the order of the origins. A redrive sends
the original record to its original topic again, with the origin in a header, so that every reader handles it once.
"""

import re
import traceback
from datetime import UTC, datetime
from typing import NamedTuple

from esper.errors import ContractError, DecodeError
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Headers, Position, Record
from esper.schemas.topics import DEAD_LETTER_SUFFIX

HEADER_PREFIX = "esper_dlq_"
REASON_HEADER = HEADER_PREFIX + "reason"  # the first of the headers that a dead letter adds
PROJECTIONS = "projections"  # the reader whose dead letters a replay skips: the stream workers
ORIGIN_HEADER = "esper_redrive_origin"
ATTEMPTS_HEADER = "esper_redrive_attempts"
MAX_TEXT_BYTES = 2_000
MAX_TRACE_BYTES = 4_000

_ORIGIN = re.compile(r"(?P<topic>[^/]{1,249})/(?P<partition>[0-9]{1,9})/(?P<offset>[0-9]{1,18})")
_NUMBER = re.compile(r"[0-9]{1,18}")


class DeadLetter(NamedTuple):
    """A dead letter in the log: the record that could not be decoded, and why."""

    position: Position  # of the dead letter itself
    origin: Position  # of the record that could not be decoded
    first_origin: Position  # of the record before its first redrive; equals ``origin`` if it was never redriven
    attempts: int  # how often a reader has tried to decode the record
    reason: str
    detail: str
    error: str  # the class of the error
    trace: str
    at: str  # ISO 8601
    reader: str  # the reader that failed, such as ``projections`` or ``group NAME``
    record: StoredRecord


def dead_letter(origin: StoredRecord, error: DecodeError, reader: str) -> Record:
    """The dead letter for a record: its key, value and headers, plus headers with the reason and the origin.

    The added headers are ``esper_dlq_`` reason, detail, error (its class), trace, topic, partition, offset, attempts,
    at and reader.
    """
    position = origin.position
    texts = {
        "reason": error.reason,
        "detail": stored_detail(error),
        "error": type(error).__name__,
        "trace": "".join(traceback.format_exception(error)),
        "topic": position.topic,
        "partition": str(position.partition),
        "offset": str(position.offset),
        "attempts": str(_num_redrives(origin.headers) + 1),
        "at": datetime.now(UTC).isoformat(),
        "reader": reader,
    }
    limits = {"trace": MAX_TRACE_BYTES}
    added = tuple((HEADER_PREFIX + n, _truncated(text, limits.get(n, MAX_TEXT_BYTES))) for n, text in texts.items())
    return Record(
        topic=position.topic + DEAD_LETTER_SUFFIX,
        key=origin.key,
        value=origin.value,
        headers=origin.headers + added,
        timestamp_ms=origin.timestamp_ms,
        partition=position.partition,
    )


def reason_of(dead_letter: Record) -> str:
    """The reason in the headers of a dead letter."""
    reasons = [text for name, text in dead_letter.headers if name == REASON_HEADER and text is not None]
    return reasons[-1].decode(errors="replace") if reasons else "unknown"


def stored_detail(error: DecodeError) -> str:
    """The error's detail as it is stored: truncated, and without NUL, which Postgres refuses."""
    return _truncated(error.detail.replace("\x00", "\\0"), MAX_TEXT_BYTES).decode()


def read_dead_letter(stored: StoredRecord) -> DeadLetter:
    """Parse a record of a dead-letter topic.

    Raises:
        ContractError: Esper did not write it.
    """
    start = max((n for n, (name, _text) in enumerate(stored.headers) if name == REASON_HEADER), default=None)
    if start is None:
        raise ContractError(f"{stored.position}: no {REASON_HEADER} header, so this is no dead letter of Esper's")
    texts = {n.removeprefix(HEADER_PREFIX): (t or b"").decode(errors="replace") for n, t in stored.headers[start:]}
    position, named = stored.position, (texts.get("topic"), texts.get("partition"))
    topic = position.topic.removesuffix(DEAD_LETTER_SUFFIX)
    offset, attempts = texts.get("offset", ""), texts.get("attempts", "")
    if named != (topic, str(position.partition)) or not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(attempts)):
        raise ContractError(f"{position}: its {HEADER_PREFIX} headers name another partition or no offset")
    origin = Position(topic, position.partition, int(offset))
    record = stored._replace(position=origin, headers=stored.headers[:start])
    return DeadLetter(
        position=position,
        origin=origin,
        first_origin=first_origin(record.headers, origin),
        attempts=int(attempts),
        record=record,
        **{name: texts.get(name, "") for name in ("reason", "detail", "error", "trace", "at", "reader")},
    )


def redriven_record(letter: DeadLetter) -> Record:
    """The original record, for its original topic and partition, with its first origin in a header."""
    kept = tuple((n, text) for n, text in letter.record.headers if n not in (ORIGIN_HEADER, ATTEMPTS_HEADER))
    first = letter.first_origin
    added = {ORIGIN_HEADER: f"{first.topic}/{first.partition}/{first.offset}", ATTEMPTS_HEADER: str(letter.attempts)}
    return Record(
        topic=first.topic,
        key=letter.record.key,
        value=letter.record.value,
        headers=kept + tuple((n, text.encode()) for n, text in added.items()),
        timestamp_ms=letter.record.timestamp_ms,
        partition=first.partition,
    )


def first_origin(headers: Headers, position: Position) -> Position:
    """Where the record at ``position`` was before its first redrive; ``position`` itself if it was never redriven.

    A header that names no earlier offset of the same partition was not written by a redrive, and is ignored.
    """
    texts = [text for name, text in headers if name == ORIGIN_HEADER and text is not None]
    found = _ORIGIN.fullmatch(texts[-1].decode(errors="replace")) if texts else None
    if found is None or (found["topic"], int(found["partition"])) != position[:2]:
        return position
    offset = int(found["offset"])
    return position._replace(offset=offset) if offset < position.offset else position


def _num_redrives(headers: Headers) -> int:
    texts = [text.decode(errors="replace") for name, text in headers if name == ATTEMPTS_HEADER and text is not None]
    return int(texts[-1]) if texts and _NUMBER.fullmatch(texts[-1]) else 0


def _truncated(text: str, limit: int) -> bytes:
    """UTF-8 of at most ``limit`` bytes, cut between characters; lone surrogates are escaped."""
    return text.encode(errors="backslashreplace")[:limit].decode(errors="ignore").encode()
