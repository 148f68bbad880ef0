"""The fast decoder of health reports accepts nothing that the contract refuses, and decodes the same values."""

import json
import math
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.events.contract_strategies import values_of

from esper.errors import DecodeError, NewerVersionError
from esper.oona.cloudevents import encode
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Headers, Position
from esper.schemas.base import MAX_INT64
from esper.schemas.events import LayerHealthMeasured
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import TELEMETRY
from esper.streams.projectors.health_report_decoder import HealthReport, read_report

REPORTS = values_of(LayerHealthMeasured)
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 1.5, -0.0, 1e999, 2**63, 2**31, 2**53 + 1, "", "1", "a\x00", "x" * 256, "UPPER", [], {}, "run\n",
)  # fmt: skip
BYTES = (b"", b"\xff", b"\x00", b"a" * 256, b"2026-13-01T00:00:00+00:00", b"2026-11-25T00:00:00", b"00-0-0-00", None)


def stored(event: LayerHealthMeasured) -> StoredRecord:
    record = encode(OonaMessage.of(event, id=uuid.uuid4(), source="test"))
    return StoredRecord(Position(TELEMETRY.name, 0, 0), record.key, record.value, record.headers, 0)


def as_data(report: HealthReport | LayerHealthMeasured) -> dict[str, Any]:
    fields = {n: getattr(report, n) for n in LayerHealthMeasured.model_fields if n != "signals"}
    names = type(report.signals[0]).__annotations__
    return {**fields, "signals": [{n: getattr(s, n) for n in names} for s in report.signals]}


def assert_decoders_agree(record: StoredRecord) -> None:
    """Check that a record which the fast decoder accepts decodes to the same values through the contract."""
    fast = read_report(record)
    if fast is None:
        return
    full = record.decode().data
    assert isinstance(full, LayerHealthMeasured)
    assert as_data(fast) == as_data(full)
    assert all(
        math.copysign(1, a.health_score) == math.copysign(1, b.health_score)
        for a, b in zip(fast.signals, full.signals, strict=True)
    )


@given(REPORTS)
def test_read_report_accepts_every_trainer_report(event: LayerHealthMeasured) -> None:
    assume(all(signal.epoch <= MAX_INT64 for signal in event.signals))
    record = stored(event)
    assert read_report(record) is not None
    assert_decoders_agree(record)


def changed_value(event: LayerHealthMeasured, change: Callable[[dict[str, Any]], None]) -> StoredRecord:
    record = stored(event)
    body = json.loads(record.value or b"")
    change(body)
    return record._replace(value=json.dumps(body).replace("Infinity", "1e999").encode())


@settings(max_examples=150)
@given(data=st.data(), event=REPORTS, odd=st.sampled_from(ODD), is_inner=st.booleans())
def test_read_report_refuses_values_that_the_contract_refuses(
    data: st.DataObject, event: LayerHealthMeasured, odd: Any, is_inner: bool
) -> None:
    def change(body: dict[str, Any]) -> None:
        target = data.draw(st.sampled_from(body["signals"])) if is_inner else body
        name = data.draw(st.sampled_from([*target, "unknown"]))
        if data.draw(st.booleans()):
            target[name] = odd
        else:
            target.pop(name, None)

    record = changed_value(event, change)
    try:
        record.decode()
    except (DecodeError, NewerVersionError):
        assert read_report(record) is None
    assert_decoders_agree(record)


@settings(max_examples=150)
@given(event=REPORTS, cut=st.integers(0, 400), put=st.binary(max_size=3), width=st.integers(0, 3))
def test_read_report_refuses_altered_bytes(event: LayerHealthMeasured, cut: int, put: bytes, width: int) -> None:
    record = stored(event)
    value = record.value or b""
    at = cut % (len(value) + 1)
    altered = record._replace(value=value[:at] + put + value[at + width :])
    try:
        altered.decode()
    except (DecodeError, NewerVersionError):
        assert read_report(altered) is None
    assert_decoders_agree(altered)


@settings(max_examples=150)
@given(data=st.data(), event=REPORTS)
def test_read_report_refuses_invalid_headers(data: st.DataObject, event: LayerHealthMeasured) -> None:
    record = stored(event)
    headers: list[tuple[str, bytes | None]] = list(record.headers)
    at = data.draw(st.integers(0, len(headers) - 1))
    match data.draw(st.sampled_from(["change", "drop", "repeat", "add"])):
        case "change":
            headers[at] = (headers[at][0], data.draw(st.sampled_from(BYTES)))
        case "drop":
            del headers[at]
        case "repeat":
            headers.append((headers[at][0], data.draw(st.sampled_from(BYTES))))
        case _:
            headers.append((data.draw(st.sampled_from(["esper_redrive_origin", "ce_causationid", "odd"])), b"x/0/1"))
    altered: Headers = tuple(headers)
    changed = record._replace(headers=altered)
    try:
        changed.decode()
    except (DecodeError, NewerVersionError):
        assert read_report(changed) is None
    assert_decoders_agree(changed)


@pytest.mark.parametrize("value", [None, b"", b"{}", b"[1]", b'"text"', b"\xff\xfe", b'{"type":"\\ud800"}'])
def test_read_report_returns_none_for_other_records(value: bytes | None) -> None:
    record = StoredRecord(Position(TELEMETRY.name, 0, 0), b"k", value, (("ce_type", b"x"),), 0)
    assert read_report(record) is None
