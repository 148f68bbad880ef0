"""The promises to readers of the log: types, topics, keys, envelopes, validation."""

import math
import uuid
from datetime import UTC, datetime

import pytest
from aiokafka.partitioner import murmur2
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from support.events.event_examples import EXAMPLES, KERNEL, SIGNAL, SPEC, registrations_on, wrap_event

from esper.errors import DecodeError, NewerVersionError
from esper.oona.cloudevents import decode, encode
from esper.oona.log_reader import partition_of
from esper.schemas import events, topics
from esper.schemas.assets import Blueprint, Seed
from esper.schemas.change_verdicts import judge
from esper.schemas.enums import Action, BlueprintChange, SeedStage, Verdict
from esper.schemas.events import AnyEvent, Event
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.registry import REGISTRY
from esper.schemas.upcasters import EVENT_TYPE, next_version


def test_examples_cover_every_event_type() -> None:
    assert {e.type for e in EXAMPLES} == set(REGISTRY)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda e: e.type)
class TestEveryEvent:
    def test_round_trips(self, event: Event) -> None:
        sent = wrap_event(event)
        record = encode(sent)
        assert decode(record.topic, record.value, record.headers) == sent
        assert TypeAdapter(AnyEvent).validate_json(event.model_dump_json()) == event

    def test_is_a_cloud_event_for_the_cloudevents_library(self, event: Event) -> None:
        sent = wrap_event(event)
        record = encode(sent)
        read = from_binary_event(KafkaMessage(headers=dict(record.headers), key=record.key, value=record.value))
        assert (read.get_id(), read.get_type(), read.get_source()) == (str(sent.id), event.type, "test")
        assert read.get_time() == sent.time
        assert read.get_specversion() == "1.0"
        assert read.get_extension("correlationid") == sent.correlation_id
        assert read.get_extension("causationid") == str(sent.causation_id)
        assert read.get_data()["type"] == event.type

    def test_has_the_key_and_type_of_the_registry(self, event: Event) -> None:
        entry = REGISTRY[event.type]
        assert EVENT_TYPE.fullmatch(event.type)
        assert encode(wrap_event(event)).key.decode() == str(getattr(event, entry.key_field))
        assert entry in registrations_on(entry.topic)

    def test_refuses_unknown_fields_and_assignment(self, event: Event) -> None:
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(event).model_validate({**event.model_dump(), "surprise": 1})
        with pytest.raises(ValidationError, match="frozen"):
            event.type = "other"

    def test_is_refused_on_another_topic_and_in_a_newer_version(self, event: Event) -> None:
        record = encode(wrap_event(event))
        other = topics.RUNS if REGISTRY[event.type].topic != topics.RUNS else topics.COMMANDS
        with pytest.raises(DecodeError, match="wrong_topic"):
            decode(other.name, record.value, record.headers)
        newer = [(n, next_version(event.type).encode() if n == "ce_type" else v) for n, v in record.headers]
        with pytest.raises(NewerVersionError, match="upgrade"):
            decode(record.topic, record.value, newer)


@pytest.mark.parametrize(
    ("value", "drop", "reason"),
    [
        (b"\xff\xfe", None, "bad_json"),
        (b'{"type": "esper.run.ended.v1"}', None, "invalid"),
        (b"[]", None, "invalid"),
        (None, None, "no_value"),
        (b"{}", "ce_type", "missing_header"),
        (b"{}", "ce_id", "invalid"),
    ],
)
def test_decode_refuses_invalid_records_with_a_reason(value: bytes | None, drop: str | None, reason: str) -> None:
    record = encode(wrap_event(EXAMPLES[7]))
    headers = [(n, v) for n, v in record.headers if n != drop]
    with pytest.raises(DecodeError) as caught:
        decode(record.topic, value, headers)
    assert caught.value.reason == reason


def test_decode_error_names_field_and_value() -> None:
    record = encode(wrap_event(EXAMPLES[7]))
    broken = record.value.replace(b'"step":40', b'"step":-4')
    with pytest.raises(DecodeError, match=r"step: .*greater than or equal to 0 \(got -4\)"):
        decode(record.topic, broken, record.headers)


@given(st.text(min_size=1, max_size=80))
def test_partition_of_equals_the_kafka_default_partitioner(key: str) -> None:
    assert partition_of(key, topics.RUNS) == (murmur2(key.encode()) & 0x7FFFFFFF) % 12


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(mean=FLOATS, std=FLOATS.map(abs), gradient=st.none() | FLOATS.map(abs))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_signals_with_non_finite_statistics_round_trip(mean: float, std: float, gradient: float | None) -> None:
    values = (mean, std, *(() if gradient is None else (gradient,)))
    is_finite = all(math.isfinite(v) for v in values)
    raw = {**SIGNAL, "health_score": 0.5 if is_finite else 0.0}
    signal = HealthSignal.model_validate(
        {**raw, "activation_mean": mean, "activation_std": std, "gradient_norm": gradient}
    )
    assert signal.non_finite is not is_finite
    assert HealthSignal.model_validate_json(signal.model_dump_json()) == signal


def test_non_finite_signal_needs_score_0() -> None:
    with pytest.raises(ValidationError, match="must be 0"):
        HealthSignal(**SIGNAL, non_finite=True)


def test_assets_validate_assignments() -> None:
    seed = Seed(layer_id="fc1", seed_id=0)
    with pytest.raises(ValidationError):
        seed.alpha = 2.0
    with pytest.raises(ValidationError, match="must name its blueprint"):
        Seed(layer_id="fc1", seed_id=0, stage=SeedStage.TRAINING)


def test_decision_fields_must_match_the_action() -> None:
    wait = EXAMPLES[9].model_dump()
    for wrong in (
        {"action": Action.CULL},
        {"layer_id": "fc1", "seed_id": 1},
        {"layer_id": "fc1"},
        {"action": Action.GERMINATE, "layer_id": "fc1", "seed_id": 1},
        {"stale": True},
        {"view_digest": None},
        {"probability": 0.0},
    ):
        with pytest.raises(ValidationError):
            events.DecisionMade.model_validate({**wait, **wrong})


def test_events_check_rules_between_fields() -> None:
    with pytest.raises(ValidationError, match="must be the report's"):
        events.LayerHealthMeasured.model_validate({**EXAMPLES[0].model_dump(), "layer_id": "fc2"})
    with pytest.raises(ValidationError, match="spec: required for change propose"):
        events.BlueprintChangeRequested(blueprint_id="noop", change="retire", expected_version=3, spec=SPEC)
    with pytest.raises(ValidationError, match="must be the kernel's"):
        events.KernelRegistered(blueprint_id="other", kernel=KERNEL)


def test_field_report_has_fork_exactly_for_method_fork() -> None:
    fork = next(e for e in EXAMPLES if isinstance(e, events.FieldReported)).model_dump()
    record = {**fork, "method": "before_after", "fork": None}
    assert events.FieldReported.model_validate(record).fork is None
    assert events.FieldReported.model_validate({**fork, "outcome": "training"}).outcome == "training"
    for wrong in ({**fork, "fork": None}, {**record, "fork": fork["fork"]}):
        with pytest.raises(ValidationError, match="required for method=fork"):
            events.FieldReported.model_validate(wrong)
    with pytest.raises(ValidationError, match="needs a final stage"):
        events.FieldReported.model_validate({**record, "outcome": "training"})


@given(st.lists(st.tuples(st.sampled_from(list(BlueprintChange)), st.integers(0, 4)), max_size=12))
def test_judge_counts_accepted_changes_as_versions(requests: list[tuple[BlueprintChange, int]]) -> None:
    blueprint: Blueprint | None = None
    accepted = 0
    for change, version in requests:
        spec = SPEC if change is BlueprintChange.PROPOSE else None
        request = events.BlueprintChangeRequested(
            blueprint_id="noop", change=change, expected_version=version, spec=spec
        )
        verdict, after = judge(blueprint, request)
        if verdict is Verdict.ACCEPTED:
            accepted += 1
        else:
            assert after == blueprint
        if version != accepted - (verdict is Verdict.ACCEPTED):
            assert verdict is Verdict.WRONG_VERSION
        blueprint = after
        assert (blueprint.version if blueprint else 0) == accepted


def test_topics_have_pinned_partitions_and_retention() -> None:
    counts = {t.name: (t.num_partitions, t.retention_ms) for t in topics.TOPICS}
    assert counts["telemetry.seed.health"] == (12, 72 * 3600 * 1000)
    assert counts["innovation.blueprints"] == (6, -1)
    assert len(topics.all_topics()) == 2 * len(counts) == 20
    assert all(t.dead_letters.num_partitions == t.num_partitions for t in topics.TOPICS)
    assert topics.POLICIES.partitions == [(topics.POLICIES.name, n) for n in range(6)]


def test_messages_continue_the_trace_of_their_cause() -> None:
    first = OonaMessage.of(EXAMPLES[7], id=uuid.uuid4(), source="a", time=datetime.now(UTC))
    second = OonaMessage.of(EXAMPLES[7], id=uuid.uuid4(), source="b", traceparent=first.traceparent)
    assert first.traceparent is not None
    assert second.traceparent is not None
    assert first.traceparent.split("-")[1] == second.traceparent.split("-")[1]
    assert first.traceparent != second.traceparent
