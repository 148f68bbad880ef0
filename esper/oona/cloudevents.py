"""Encodes events as Kafka records and decodes them: CloudEvents 1.0, Kafka protocol binding, binary mode.

The value is the event's JSON; the headers hold the envelope. Owns the header names. Invariant: ``decode`` returns
the message that ``encode`` was given.
"""

from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from esper.errors import DecodeError, NewerVersionError
from esper.oona.records import Record
from esper.schemas.events import Event
from esper.schemas.messages import OonaMessage
from esper.schemas.registry import REGISTRY, NewerEventVersion, Registration, Registry, UnknownEventType
from esper.schemas.upcasters import upcast

SPEC_VERSION = "1.0"
CONTENT_TYPE = "application/json"
MAX_REPORTED_ERRORS = 3
MAX_FIELD_CHARS, MAX_ALLOWED_CHARS, MAX_VALUE_CHARS = 120, 200, 80


def encode(message: OonaMessage) -> Record:
    """Encode a message as a record."""
    entry = message.registration
    headers = {
        "ce_specversion": SPEC_VERSION,
        "ce_id": str(message.id),
        "ce_source": message.source,
        "ce_type": entry.type,
        "ce_time": message.time.isoformat(),
        "ce_dataschema": message.data_schema,
        "content-type": CONTENT_TYPE,
        "ce_correlationid": message.correlation_id,
    }
    if message.causation_id is not None:
        headers["ce_causationid"] = str(message.causation_id)
    if message.traceparent is not None:
        headers["traceparent"] = message.traceparent
    return Record(
        topic=entry.topic.name,
        key=entry.key_of(message.data).encode(),
        value=message.data.model_dump_json(exclude_none=False).encode(),
        headers=tuple((name, text.encode()) for name, text in headers.items()),
        timestamp_ms=int(message.time.timestamp() * 1000),
    )


def decode(
    topic: str, value: bytes | None, headers: Iterable[tuple[str, bytes | None]], *, registry: Registry = REGISTRY
) -> OonaMessage:
    """Decode a record. An old version of an event type is returned as the newest one.

    The value is strict JSON: no NaN, no number in quotes.

    Raises:
        NewerVersionError: a newer version of a known type. Upgrade this program; do not skip the record.
        DecodeError: the record is invalid in any other way; its ``reason`` goes into the dead letter.
    """
    texts = _texts(headers)
    event_type = _required(texts, "ce_type")
    entry = _registration(registry, topic, event_type)
    if value is None:
        raise DecodeError("no_value", f"a record of {entry.type} has no value")
    if event_type != entry.type:
        value = _upcast(registry, event_type, value)
    return _message(entry, _event(entry, value), texts)


def _texts(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    try:
        return {name: text.decode() for name, text in headers if text is not None}
    except UnicodeDecodeError as error:
        raise DecodeError("bad_header", f"a header is not UTF-8: {error}") from None


def _required(texts: dict[str, str], name: str) -> str:
    if name not in texts:
        raise DecodeError("missing_header", f"no {name} header: not a CloudEvent in binary mode")
    return texts[name]


def _registration(registry: Registry, topic: str, event_type: str) -> Registration:
    try:
        entry = registry.find(event_type)
    except NewerEventVersion as error:
        raise NewerVersionError(str(error)) from error
    except UnknownEventType as error:
        raise DecodeError("unknown_type", str(error)) from error
    if entry.topic.name != topic:
        raise DecodeError("wrong_topic", f"{event_type} belongs on {entry.topic.name}, not on {topic}")
    return entry


def _upcast(registry: Registry, event_type: str, value: bytes) -> bytes:
    """The value in its newest version. Old versions have no models, so an invalid value is found only afterwards."""
    try:
        old = from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise DecodeError("bad_json", str(error)) from None
    if not isinstance(old, dict) or old.get("type") != event_type:
        raise DecodeError("invalid", f"type: must be {event_type!r}, as in the ce_type header")
    try:
        return to_json(upcast(event_type, old, registry.upcasters))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DecodeError("invalid", f"no {event_type}: its upcaster failed with {error!r}") from error


def _event(entry: Registration, value: bytes) -> Event:
    try:
        return entry.model.model_validate_json(value, strict=True)
    except ValidationError as error:
        is_json = error.errors(include_context=False, include_input=False)[0]["type"] != "json_invalid"
        raise DecodeError("invalid" if is_json else "bad_json", explain(error)) from None


def explain(error: ValidationError) -> str:
    """One line with field, rule and value of the first few errors, each shortened."""
    lines = [
        f"{'.'.join(str(p) for p in e['loc'])[:MAX_FIELD_CHARS] or 'value'}: {e['msg'][:MAX_ALLOWED_CHARS]} "
        f"(got {_shortened(e['input'])})"
        for e in error.errors(include_url=False)[:MAX_REPORTED_ERRORS]
    ]
    more = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def _shortened(value: object) -> str:
    try:
        return f"{value!r:.{MAX_VALUE_CHARS}}"
    except ValueError:  # Python does not format integers of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"


def _message(entry: Registration, event: Event, texts: dict[str, str]) -> OonaMessage:
    try:
        cause = texts.get("ce_causationid")
        return OonaMessage(
            id=UUID(_required(texts, "ce_id")),
            source=_required(texts, "ce_source"),
            time=datetime.fromisoformat(_required(texts, "ce_time")),
            data=event,
            correlation_id=texts.get("ce_correlationid") or entry.key_of(event),
            causation_id=UUID(cause) if cause else None,
            traceparent=texts.get("traceparent"),
        )
    except ValidationError as error:
        raise DecodeError("bad_header", explain(error)) from None
    except ValueError as error:
        raise DecodeError("bad_header", str(error)) from None
