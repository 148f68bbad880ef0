"""Dead letters: records that cannot be decoded, kept byte for byte with the reason and the origin."""

import traceback

from esper.errors import DecodeError
from esper.oona.consumer import StoredRecord
from esper.oona.records import Record
from esper.schemas.topics import DEAD_LETTER_SUFFIX

PREFIX = "esper_dlq_"
MAX_DETAIL_BYTES = 2_000


def dead_letter(origin: StoredRecord, error: DecodeError, *, attempts: int = 1) -> Record:
    """The dead letter of a record: same key, value and headers, and on top why and whence.

    The new headers are ``esper_dlq_`` reason, detail, error, topic, partition, offset and attempts.
    """
    where = origin.position
    added = {
        "reason": error.reason,
        "detail": error.detail,
        "error": "".join(traceback.format_exception_only(error)).strip(),
        "topic": where.topic,
        "partition": str(where.partition),
        "offset": str(where.offset),
        "attempts": str(attempts),
    }
    headers = tuple((PREFIX + name, text.encode()[:MAX_DETAIL_BYTES]) for name, text in added.items())
    return Record(
        topic=where.topic + DEAD_LETTER_SUFFIX,
        key=origin.key or b"",
        value=origin.value or b"",
        headers=origin.headers + headers,
        timestamp_ms=origin.timestamp_ms,
    )


def reason_of(letter: StoredRecord) -> dict[str, str]:
    """What ``dead_letter`` added, without the prefix."""
    return {
        name.removeprefix(PREFIX): text.decode(errors="replace")
        for name, text in letter.headers
        if name.startswith(PREFIX)
    }
