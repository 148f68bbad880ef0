"""Valid values of every model survive the wire; invalid ones are refused with a short readable reason."""

import json
import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.events.contract_strategies import values_of
from support.events.event_examples import BY_TYPE, EXAMPLES, decode_or_error, wrap_event

from esper.errors import MAX_DETAIL_CHARS, DecodeError
from esper.oona.cloudevents import decode, encode
from esper.schemas.base import Contract
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import STATISTICS, HealthSignal
from esper.schemas.registry import REGISTRY

THOROUGH = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
REASONS = {"bad_json", "invalid"}


def leaf_models(model: type[Contract]) -> list[type[Contract]]:
    """The models of esper.schemas that have no subclass there."""
    below = [m for m in model.__subclasses__() if m.__module__.startswith("esper.schemas")]
    return [c for m in below for c in leaf_models(m)] or [model]


@pytest.mark.parametrize("model", [m for m in leaf_models(Contract) if m is not OonaMessage], ids=lambda m: m.__name__)
def test_models_round_trip_through_json(model: type[Contract]) -> None:
    @given(values_of(model))
    @THOROUGH
    def round_trips(value: Contract) -> None:
        assert model.model_validate_json(value.model_dump_json(), strict=True) == value

    round_trips()


@pytest.mark.parametrize("event_type", list(REGISTRY))
def test_events_round_trip_in_their_envelope(event_type: str) -> None:
    @given(values_of(REGISTRY[event_type].model))
    @THOROUGH
    def round_trips(event: object) -> None:
        sent = wrap_event(event)  # type: ignore[arg-type]
        record = encode(sent)
        assert decode(record.topic, record.value, record.headers) == sent

    round_trips()


@given(values_of(HealthSignal), st.dictionaries(st.sampled_from(STATISTICS), st.sampled_from([math.nan, math.inf])))
@THOROUGH
def test_non_finite_statistic_becomes_null_and_is_flagged(signal: HealthSignal, lost: dict[str, float]) -> None:
    fields = {**signal.model_dump(), **lost, "health_score": 0.0 if lost else signal.health_score}
    for made in (HealthSignal(**fields), HealthSignal.model_validate(fields)):
        assert [getattr(made, name) for name in lost] == [None] * len(lost)
        assert made.non_finite is (bool(lost) or signal.non_finite)
        assert HealthSignal.model_validate_json(made.model_dump_json()) == made


NASTY = (
    "NaN", "-Infinity", "1e999", "1" * 5000, "-1", "1.5", '"5"', "true", "null", "[]", "{}", r'"\ud800"', r'"\u0000"',
    '"' + "x" * 100_000 + '"', "[" * 5000 + "]" * 5000, "[" * 5000, '{"a":' * 50 + "1" + "}" * 50, '"\\n\\u2028"', "'", "",
)  # fmt: skip


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=250, deadline=None)
def test_decode_of_a_broken_value_gives_a_short_reason(event: object, data: st.DataObject) -> None:
    record = encode(wrap_event(event))  # type: ignore[arg-type]
    value = data.draw(st.one_of(with_altered_bytes(record.value or b""), with_mangled_member(record.value or b"")))
    read = decode_or_error(record.topic, value, record.headers)
    if isinstance(read, DecodeError):
        assert read.reason in REASONS
        assert 0 < len(read.detail) <= MAX_DETAIL_CHARS
        assert read.detail.isprintable()
        read.detail.encode()
    else:
        again = encode(read)
        assert decode(again.topic, again.value, again.headers) == read


def with_altered_bytes(value: bytes) -> st.SearchStrategy[bytes]:
    """The value with some bytes dropped, changed or doubled."""
    index = st.integers(0, len(value) - 1)
    piece = st.binary(max_size=4) | st.just(value)
    return st.tuples(index, index, piece).map(lambda t: value[: min(t[:2])] + t[2] + value[max(t[:2]) :])


def with_mangled_member(value: bytes) -> st.SearchStrategy[bytes]:
    """The value with one member replaced by an extreme value, dropped or doubled, or with one added."""
    fields = json.loads(value)

    def replaced(name: str, nasty: str) -> bytes:
        return json.dumps({**fields, name: "@@"}).replace('"@@"', nasty).encode()

    def without(name: str) -> bytes:
        return json.dumps({k: v for k, v in fields.items() if k != name}).encode()

    def doubled(name: str, nasty: str) -> bytes:
        return value[:-1] + f",{json.dumps(name)}:{nasty}}}".encode()

    name, nasty = st.sampled_from(list(fields)), st.sampled_from(NASTY)
    return st.one_of(
        st.builds(replaced, name, nasty),
        st.builds(without, name),
        st.builds(doubled, name | st.text(max_size=300), nasty),
    )


HEADERS = st.sampled_from(
    ["ce_id", "ce_source", "ce_type", "ce_time", "ce_correlationid", "ce_causationid", "traceparent"]
)


@given(HEADERS, st.binary(max_size=60) | st.text(max_size=600).map(str.encode))
@example("ce_type", b"esper.run.ended.v1\n")
@example("ce_type", b"esper.run.ended.v" + b"9" * 5000)
@example("ce_time", b"2026-01-01T00:00:00")
@example("ce_source", b"\x00")
@settings(max_examples=150, deadline=None)
def test_decode_of_a_broken_header_gives_a_short_reason(name: str, text: bytes) -> None:
    record = encode(wrap_event(BY_TYPE["esper.run.ended.v1"]))
    headers = [(n, text if n == name else t) for n, t in record.headers]
    read = decode_or_error(record.topic, record.value, headers)
    if isinstance(read, DecodeError):
        assert read.reason in {"bad_header", "unknown_type", "missing_header"}
        assert len(read.detail) <= MAX_DETAIL_CHARS
        assert read.detail.isprintable()


@pytest.mark.parametrize(
    ("event_type", "old", "new", "expected_text"),
    [
        ("esper.run.ended.v1", '"step":40', '"step":-4', r"step: .*greater than or equal to 0 \(got -4\)"),
        ("esper.run.ended.v1", '"step":40', '"step":"40"', r"step: .*valid integer \(got '40'\)"),
        ("esper.run.ended.v1", '"status":"completed"', '"status":"done"', r"status: .*'completed'.*\(got 'done'\)"),
        ("esper.run.ended.v1", '"step":40', '"step":40,"x":1', r"x: Extra inputs are not permitted \(got 1\)"),
        ("esper.run.ended.v1", '"step":40,', "", r"step: Field required"),
        ("esper.epoch.completed.v1", "0.5", "NaN", r"metrics.val_accuracy: .*finite number \(got nan\)"),
        (
            "esper.layer-health.measured.v2",
            '"health_score":0.0',
            '"health_score":0.1',
            r"health_score of seed 1 must be 0",
        ),
        ("esper.layer-health.measured.v2", '"seed_id":1', '"seed_id":1024', r"signals.1.seed_id: .*1023 \(got 1024\)"),
    ],
)
def test_decode_error_names_field_value_and_rule(event_type: str, old: str, new: str, expected_text: str) -> None:
    record = encode(wrap_event(BY_TYPE[event_type]))
    assert record.value is not None
    broken = record.value.replace(old.encode(), new.encode())
    with pytest.raises(DecodeError, match=expected_text):
        decode(record.topic, broken, record.headers)
