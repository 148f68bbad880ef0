"""What is promised to every reader of the log: types, topics, keys, envelopes, refusals."""

import math
import uuid
from datetime import UTC, datetime

import pytest
from aiokafka.partitioner import murmur2
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.errors import DecodeError, NewerVersionError
from esper.oona.cloudevents import decode, encode
from esper.oona.consumer import partition_of
from esper.schemas import events, topics
from esper.schemas.assets import Blueprint, BlueprintSpec, Kernel, LayerNode, Seed
from esper.schemas.enums import Action, BlueprintChange, SeedStage, Verdict
from esper.schemas.events import ANY_EVENT, Event
from esper.schemas.lifecycle import ACTIVE_STAGES, STAGE_CODES, STAGES, TRANSITIONS, way_out
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.registry import EVENT_TYPE, REGISTRY, types_on
from esper.schemas.verdicts import judge

SHA = "ab" * 32
SPEC = BlueprintSpec(module="noop", targets=("linear",))
RUN = {"run_id": "run-1", "incarnation": 1}
TRAINER = {**RUN, "sequence": 3, "step": 40}
SEED = {"layer_id": "fc1", "seed_id": 0}
COMMAND = {**RUN, **SEED, "boundary": 2, "decision_id": uuid.uuid4(), "expires_at_step": 50}
KERNEL = Kernel(
    kernel_sha256=SHA, blueprint_id="noop", blueprint_version=3, target="linear", num_features=8,
    num_parameters=0, size_bytes=10,
)  # fmt: skip
SIGNAL = {**SEED, "chunk_id": 0, "epoch": 0, "health_score": 0.5}
EXAMPLES: tuple[Event, ...] = (
    events.LayerHealthMeasured(**TRAINER, epoch=0, layer_id="fc1", signals=(HealthSignal(**SIGNAL),)),
    events.RunStarted(
        **TRAINER, model="Net", edges=(), boundary_steps=5, command_offset=0,
        layers=(LayerNode(layer_id="fc1", kind="linear", num_features=8, num_parameters=9, num_seeds=2),),
    ),
    events.RunResumed(**TRAINER, from_incarnation=1, epoch=2, seeds=(), command_offset=4),
    events.BoundaryReached(**TRAINER, boundary=2, epoch=0, last_sequences={"system.runs": 2}),
    events.EpochCompleted(**TRAINER, epoch=0, metrics={"val_accuracy": 0.5, "loss": None}),
    events.CheckpointSaved(**TRAINER, epoch=0, sha256=SHA, size_bytes=5, command_offset=0),
    events.TelemetryGap(**TRAINER, from_step=1, num_lost=3),
    events.RunEnded(**TRAINER, status="completed"),
    events.ViewRecorded(**RUN, boundary=2, view_version=1, digest=SHA, view_zstd="YWJj"),
    events.DecisionMade(
        **RUN, boundary=2, step=40, action="wait", probability=0.9, policy_id="wait", policy_version=1,
        reason="x", view_digest=SHA,
    ),
    events.GerminateSeed(**COMMAND, blueprint_id="noop", blueprint_version=3, kernel_sha256=SHA, kernel_size_bytes=9),
    events.CullSeed(**COMMAND, expected_stage="training"),
    events.FossilizeSeed(**COMMAND),
    events.SeedTransitioned(**TRAINER, **SEED, from_stage="dormant", to_stage="germinated", reason="command"),
    events.CommandRejected(**TRAINER, **SEED, command_id=uuid.uuid4(), reason="expired"),
    events.FieldReported(
        **TRAINER, **SEED, blueprint_id="noop", outcome="culled", decision_id=uuid.uuid4(), command_id=uuid.uuid4(),
        method="before_after", metric="val_accuracy", before=0.1, after=None, germinated_at_step=1, num_parameters=0,
    ),
    events.BlueprintChangeRequested(blueprint_id="noop", change="propose", expected_version=0, spec=SPEC),
    events.KernelRegistered(blueprint_id="noop", kernel=KERNEL),
    events.PolicyActivated(
        policy_id="wait", policy_version=1, kind="wait", activation_id=uuid.uuid4(), reason="test"
    ),
    events.DeadLetterRedriven(
        topic="system.runs", partition=3, offset=9, letter_offset=0, redriven_offset=12, redrive_id=uuid.uuid4(),
        reason="the reader was mended",
    ),
)  # fmt: skip


def message(event: Event) -> OonaMessage:
    return OonaMessage.of(event, id=uuid.uuid4(), source="test", causation_id=uuid.uuid4())


def test_there_is_an_example_of_every_event_type() -> None:
    assert {e.type for e in EXAMPLES} == set(REGISTRY)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda e: e.type)
class TestEveryEvent:
    def test_comes_back_as_it_went(self, event: Event) -> None:
        sent = message(event)
        record = encode(sent)
        assert decode(record.topic, record.value, record.headers) == sent
        assert ANY_EVENT.validate_json(event.model_dump_json()) == event

    def test_is_a_cloud_event_to_another_library(self, event: Event) -> None:
        sent = message(event)
        record = encode(sent)
        read = from_binary_event(KafkaMessage(headers=dict(record.headers), key=record.key, value=record.value))
        assert (read.get_id(), read.get_type(), read.get_source()) == (str(sent.id), event.type, "test")
        assert read.get_time() == sent.time
        assert read.get_specversion() == "1.0"
        assert read.get_extension("correlationid") == sent.correlation_id
        assert read.get_extension("causationid") == str(sent.causation_id)
        assert read.get_data()["type"] == event.type

    def test_is_keyed_and_named_by_the_registry(self, event: Event) -> None:
        entry = REGISTRY[event.type]
        assert EVENT_TYPE.match(event.type)
        assert encode(message(event)).key.decode() == str(getattr(event, entry.key_field))
        assert entry in types_on(entry.topic)

    def test_refuses_unknown_fields_and_change(self, event: Event) -> None:
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(event).model_validate({**event.model_dump(), "surprise": 1})
        with pytest.raises(ValidationError, match="frozen"):
            event.type = "other"

    def test_elsewhere_or_newer_is_refused_for_what_it_is(self, event: Event) -> None:
        record = encode(message(event))
        other = topics.RUNS if REGISTRY[event.type].topic != topics.RUNS else topics.COMMANDS
        with pytest.raises(DecodeError, match="wrong_topic"):
            decode(other.name, record.value, record.headers)
        newer = [(n, v.replace(b".v1", b".v2") if n == "ce_type" else v) for n, v in record.headers]
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
def test_garbage_is_refused_with_a_reason(value: bytes | None, drop: str | None, reason: str) -> None:
    record = encode(message(EXAMPLES[7]))
    headers = [(n, v) for n, v in record.headers if n != drop]
    with pytest.raises(DecodeError) as caught:
        decode(record.topic, value, headers)
    assert caught.value.reason == reason


def test_a_refusal_names_field_and_value() -> None:
    record = encode(message(EXAMPLES[7]))
    broken = record.value.replace(b'"step":40', b'"step":-4')
    with pytest.raises(DecodeError, match=r"step: .*greater than or equal to 0 \(got -4\)"):
        decode(record.topic, broken, record.headers)


@given(st.text(min_size=1, max_size=80))
def test_the_partition_is_that_of_every_kafka_client(key: str) -> None:
    assert partition_of(key, topics.RUNS) == (murmur2(key.encode()) & 0x7FFFFFFF) % 12


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(mean=FLOATS, std=FLOATS.map(abs), gradient=st.none() | FLOATS.map(abs))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_the_sickest_signals_survive(mean: float, std: float, gradient: float | None) -> None:
    values = (mean, std, *(() if gradient is None else (gradient,)))
    is_finite = all(math.isfinite(v) for v in values)
    raw = {**SIGNAL, "health_score": 0.5 if is_finite else 0.0}
    signal = HealthSignal.model_validate(
        {**raw, "activation_mean": mean, "activation_std": std, "gradient_norm": gradient}
    )
    assert signal.non_finite is not is_finite
    assert HealthSignal.model_validate_json(signal.model_dump_json()) == signal


def test_a_sick_signal_cannot_look_healthy() -> None:
    with pytest.raises(ValidationError, match="must be 0"):
        HealthSignal(**SIGNAL, non_finite=True)


def test_assets_validate_what_is_assigned() -> None:
    seed = Seed(layer_id="fc1", seed_id=0)
    with pytest.raises(ValidationError):
        seed.alpha = 2.0
    with pytest.raises(ValidationError, match="must name its blueprint"):
        Seed(layer_id="fc1", seed_id=0, stage=SeedStage.TRAINING)


def test_decisions_have_what_their_action_needs() -> None:
    wait = EXAMPLES[9].model_dump()
    for wrong in (
        {"action": Action.CULL},
        {"layer_id": "fc1", "seed_id": 1},
        {"action": Action.GERMINATE, "layer_id": "fc1", "seed_id": 1},
        {"stale": True},
        {"view_digest": None},
        {"probability": 0.0},
    ):
        with pytest.raises(ValidationError):
            events.DecisionMade.model_validate({**wait, **wrong})


def test_events_refuse_what_does_not_belong_together() -> None:
    with pytest.raises(ValidationError, match="other layers"):
        events.LayerHealthMeasured.model_validate({**EXAMPLES[0].model_dump(), "layer_id": "fc2"})
    with pytest.raises(ValidationError, match="spec goes with propose"):
        events.BlueprintChangeRequested(blueprint_id="noop", change="retire", expected_version=3, spec=SPEC)
    with pytest.raises(ValidationError, match="must be the kernel's"):
        events.KernelRegistered(blueprint_id="other", kernel=KERNEL)


def test_the_transition_table_is_whole() -> None:
    assert set(TRANSITIONS) == set(SeedStage) == set(STAGES)
    assert [STAGES[STAGE_CODES[s]] for s in SeedStage] == list(SeedStage)
    for stage in ACTIVE_STAGES:
        assert way_out(stage) in TRANSITIONS[stage]
    with pytest.raises(ValueError, match="cannot be given up"):
        way_out(SeedStage.DORMANT)


@given(st.lists(st.tuples(st.sampled_from(list(BlueprintChange)), st.integers(0, 4)), max_size=12))
def test_a_blueprint_counts_its_accepted_changes(requests: list[tuple[BlueprintChange, int]]) -> None:
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


def test_topics_are_those_of_the_design() -> None:
    counts = {t.name: (t.num_partitions, t.retention_ms) for t in topics.TOPICS}
    assert counts["telemetry.seed.health"] == (12, 72 * 3600 * 1000)
    assert counts["innovation.blueprints"] == (6, -1)
    assert len(topics.all_topics()) == 2 * len(counts) == 20
    assert all(t.dead_letters.num_partitions == t.num_partitions for t in topics.TOPICS)


def test_a_trace_goes_on_through_its_effects() -> None:
    first = OonaMessage.of(EXAMPLES[7], id=uuid.uuid4(), source="a", time=datetime.now(UTC))
    second = OonaMessage.of(EXAMPLES[7], id=uuid.uuid4(), source="b", traceparent=first.traceparent)
    assert first.traceparent is not None
    assert second.traceparent is not None
    assert first.traceparent.split("-")[1] == second.traceparent.split("-")[1]
    assert first.traceparent != second.traceparent
