"""A fast decoder for health reports, which are most of the log.

Invariant: ``read_report`` accepts a record only if ``esper.oona.cloudevents.decode`` accepts it with the same values.
For any other record it returns None, and the caller uses ``decode``, which raises the right error.
tests/contract/test_health_reports.py compares the two.
"""

import re
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Literal

import msgspec

from esper.oona.log_reader import StoredRecord
from esper.oona.records import Headers
from esper.schemas.base import MAX_INT32, MAX_INT64, SLUG_PATTERN
from esper.schemas.topics import TELEMETRY

TYPE = "esper.layer-health.measured.v2"
MAX_FLOAT = 1.7976931348623157e308  # JSON's 1e999 would be infinite
MAX_CACHED_TEXTS = 4096

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT64)]
_Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT32)]
_SeedId = Annotated[int, msgspec.Meta(ge=0, le=1023)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Finite = Annotated[float, msgspec.Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_FLOAT)]
_Unit = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class Signal(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The health of one seed, with the fields of ``esper.schemas.operational.HealthSignal``."""

    layer_id: _Name
    seed_id: _SeedId
    chunk_id: _SeedId
    epoch: _Count
    health_score: _Unit
    activation_mean: _Finite | None = None
    activation_std: _NotNegative | None = None
    dead_ratio: _Unit | None = None
    gradient_norm: _NotNegative | None = None
    effective_rank: _NotNegative | None = None
    non_finite: bool = False


class HealthReport(msgspec.Struct, forbid_unknown_fields=True):
    """The signals of one layer at one step, as ``esper.schemas.events.LayerHealthMeasured``."""

    type: Literal["esper.layer-health.measured.v2"]
    run_id: str
    incarnation: Annotated[int, msgspec.Meta(ge=1, le=MAX_INT32)]
    sequence: _Count
    step: _Count
    epoch: _Epoch
    layer_id: _Name
    signals: Annotated[tuple[Signal, ...], msgspec.Meta(min_length=1, max_length=1024)]


_DECODER = msgspec.json.Decoder(HealthReport)
_SLUG = re.compile(SLUG_PATTERN)
_ID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TYPE = TYPE.encode()
_COMMON_HEADERS = frozenset(
    {"ce_type", "ce_source", "ce_correlationid", "ce_specversion", "ce_dataschema", "content-type"}
)


def read_report(record: StoredRecord) -> HealthReport | None:
    """The report in a record of the telemetry topic; None if the caller must use the general decoder."""
    if record.value is None or not _has_valid_envelope(record):
        return None
    try:
        report = _DECODER.decode(record.value)
    except (msgspec.MsgspecError, UnicodeError):
        return None
    layer_id = report.layer_id
    if not _is_slug(report.run_id) or "\0" in layer_id:
        return None
    for signal in report.signals:
        if signal.layer_id != layer_id or (signal.non_finite and signal.health_score > 0.0):
            return None
    return report


def _has_valid_envelope(record: StoredRecord) -> bool:
    headers = dict(record.headers)
    if len(headers) != len(record.headers) or record.position.topic != TELEMETRY.name:
        return False
    try:
        at, event_id = headers.pop("ce_time"), headers.pop("ce_id")
        trace = headers.pop("traceparent", None)
        return (
            _ID.fullmatch(event_id) is not None  # type: ignore[arg-type]  # a header without a value: TypeError
            and (trace is None or _TRACEPARENT.fullmatch(trace) is not None)
            and _are_common_headers(tuple(headers.items()))
            and datetime.fromisoformat(at.decode()).tzinfo is not None  # type: ignore[union-attr]
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


@lru_cache(MAX_CACHED_TEXTS)
def _are_common_headers(headers: Headers) -> bool:
    """Whether these are valid headers of a report, apart from those that differ between the reports of a run."""
    values = dict(headers)
    return (
        values.keys() <= _COMMON_HEADERS
        and values.get("ce_type") == _TYPE
        and _is_name(values.get("ce_source"))
        and _is_name(values.get("ce_correlationid"))
        and all(_is_text(values.get(name)) for name in ("ce_specversion", "ce_dataschema", "content-type"))
    )


@lru_cache(MAX_CACHED_TEXTS)
def _is_slug(text: str) -> bool:
    return _SLUG.fullmatch(text) is not None


def _is_text(header: bytes | None) -> bool:
    try:
        return header is None or header.decode() is not None
    except UnicodeDecodeError:
        return False


def _is_name(header: bytes | None) -> bool:
    return header is not None and _is_text(header) and 1 <= len(header.decode()) <= 255 and b"\0" not in header
