"""One small event of every type, and helpers that wrap and decode events."""

import uuid
from collections.abc import Iterable

from esper.errors import DecodeError
from esper.oona.cloudevents import decode
from esper.schemas import events
from esper.schemas.assets import BlueprintSpec, Kernel, LayerEdge, LayerNode, Measurement, Seed, TrainingResults
from esper.schemas.events import Event
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.registry import REGISTRY, Registration
from esper.schemas.topics import TopicSpec

SHA = "ab" * 32
SPEC = BlueprintSpec(module="low_rank", parameters={"rank": 4, "scale": 0.5}, targets=("linear",), description="thin")
RUN = {"run_id": "run-1", "incarnation": 1}
TRAINER = {**RUN, "sequence": 3, "step": 40}
SEED = {"layer_id": "fc1", "seed_id": 0}
COMMAND = {**RUN, **SEED, "boundary": 2, "decision_id": uuid.UUID(int=7), "expires_at_step": 50}
KERNEL = Kernel(
    kernel_sha256=SHA, blueprint_id="noop", blueprint_version=3, target="linear", num_features=8,
    num_parameters=0, size_bytes=10,
)  # fmt: skip
MEASURED = Measurement(
    target="linear", num_features=8, num_parameters=16, positions=64, flops=0, batch_size=16, latency_p50_ms=0.02,
    latency_p95_ms=0.5, peak_memory_bytes=4096,
)  # fmt: skip
SIGNAL = {**SEED, "chunk_id": 0, "epoch": 0, "health_score": 0.5}
SICK = HealthSignal(**{**SIGNAL, "seed_id": 1, "chunk_id": 1, "health_score": 0.0}, activation_mean=float("nan"))
RESULTS = TrainingResults(
    initial_accuracy=0.1, final_accuracy=0.9, adaptations_applied=2, overhead_percent=3.5, epochs=4, steps=400,
    duration_s=12.5,
)  # fmt: skip
FORK = events.ForkedPair(
    horizon_steps=60, num_draws=2, variance=0.25, num_parameters_host=90, flops_added=0, flops_host=180
)
EXAMPLES: tuple[Event, ...] = (
    events.LayerHealthMeasured(
        **TRAINER, epoch=0, layer_id="fc1", signals=(HealthSignal(**SIGNAL, dead_ratio=0.25, effective_rank=3.5), SICK)
    ),
    events.RunStarted(
        **TRAINER, model="Net", edges=(LayerEdge(source="fc1", target="fc2"),), boundary_steps=5, command_offset=0,
        layers=tuple(
            LayerNode(layer_id=name, kind="linear", num_features=8, num_parameters=9, num_seeds=2)
            for name in ("fc1", "fc2")
        ),
        hyperparameters={"lr": 0.1, "epochs": 3, "optimizer": "sgd", "nesterov": True},
    ),
    events.RunResumed(
        **TRAINER, from_incarnation=1, epoch=2, command_offset=4,
        seeds=(Seed(**SEED, stage="grafting", stage_since_step=30, alpha=0.5, blueprint_id="noop", kernel_sha256=SHA),),
    ),
    events.BoundaryReached(**TRAINER, boundary=2, epoch=0, last_sequences={"system.runs": 2}),
    events.EpochCompleted(**TRAINER, epoch=0, metrics={"val_accuracy": 0.5, "loss": None}),
    events.CheckpointSaved(**TRAINER, epoch=0, sha256=SHA, size_bytes=5, command_offset=0),
    events.TelemetryGap(**TRAINER, from_step=1, num_lost=3),
    events.RunEnded(**TRAINER, status="completed", results=RESULTS),
    events.ViewRecorded(**RUN, boundary=2, view_version=1, digest=SHA, view_zstd="YWJj"),
    events.DecisionMade(
        **RUN, boundary=2, step=40, action="wait", probability=0.9, policy_id="wait", policy_version=1,
        reason="x", view_digest=SHA,
    ),
    events.GerminateSeed(**COMMAND, blueprint_id="noop", blueprint_version=3, kernel_sha256=SHA, kernel_size_bytes=9),
    events.CullSeed(**COMMAND, expected_stage="training"),
    events.FossilizeSeed(**COMMAND),
    events.SeedTransitioned(**TRAINER, **SEED, from_stage="dormant", to_stage="germinated", reason="command"),
    events.CommandRejected(**TRAINER, **SEED, command_id=uuid.UUID(int=8), reason="expired"),
    events.BreakerChanged(
        **TRAINER, **SEED, from_state="closed", to_state="open", num_failures=3, detail="a value is not finite",
    ),
    events.FieldReported(
        **TRAINER, **SEED, blueprint_id="noop", outcome="culled", decision_id=uuid.UUID(int=7),
        command_id=uuid.UUID(int=8), method="fork", metric="val_accuracy", before=0.1, after=None,
        germinated_at_step=1, num_parameters=0, fork=FORK,
    ),
    events.BlueprintChangeRequested(blueprint_id="noop", change="propose", expected_version=0, spec=SPEC),
    events.CertificateIssued(
        blueprint_id="affine", blueprint_version=2, examiner="torch 2.15.0, cpu", checks=("identity", "shapes"),
        measurements=(MEASURED,),
    ),
    events.KernelRegistered(blueprint_id="noop", kernel=KERNEL),
    events.KernelRefused(
        blueprint_id="affine", blueprint_version=3, target="linear", num_features=8, reason="ended by SIGSEGV",
    ),
    events.PolicyActivated(
        policy_id="wait", policy_version=1, kind="wait", activation_id=uuid.UUID(int=9), reason="test",
        parameters={"epsilon": 0.05},
    ),
    events.PolicyTrained(
        policy_id="gnn", policy_version=2, kind="gnn", parent_version=1, weights_sha256=SHA, weights_size_bytes=5,
        parameters={"width": 32}, num_decisions=3, figures={"loss": 0.5, "accuracy": None},
        data=(events.LogRange(topic="control.tamiyo.decisions", partition=3, from_offset=0, until_offset=7),),
    ),
    events.PolicyEvaluated(
        policy_id="gnn", policy_version=2, against_policy_id="heuristic", against_version=1, estimator="doubly_robust",
        estimate=0.5, low=0.25, high=0.75, confidence=0.95, effective_sample_size=40.5, num_decisions=200,
        held_out_runs=("run-1",), verdict="better", reason="the interval lies above 0",
    ),
    events.PolicyRolledBack(
        policy_id="gnn", policy_version=2, to_policy_id="heuristic", to_version=1, kind="heuristic",
        parameters={"patience": 3}, reason="it culled everything",
    ),
    events.DeadLetterRedriven(
        topic="system.runs", partition=3, offset=9, letter_offset=0, redriven_offset=12, redrive_id=uuid.UUID(int=10),
        reason="the reader was mended",
    ),
)  # fmt: skip
BY_TYPE = {event.type: event for event in EXAMPLES}


def registrations_on(topic: TopicSpec) -> list[Registration]:
    """The newest version of every event type on a topic."""
    return [entry for entry in REGISTRY.values() if entry.topic == topic]


def decode_or_error(topic: str, value: bytes | None, headers: Iterable[tuple[str, bytes]]) -> OonaMessage | DecodeError:
    """The message that a record decodes to, or the error that decoding raised."""
    try:
        return decode(topic, value, headers)
    except DecodeError as error:
        return error


def wrap_event(event: Event) -> OonaMessage:
    """The event in a new envelope, with random ids."""
    return OonaMessage.of(event, id=uuid.uuid4(), source="test", causation_id=uuid.uuid4())
