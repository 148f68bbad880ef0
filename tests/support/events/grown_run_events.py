"""The messages of a run that grew, on every topic of runs: with causes, a resumed process and a rejected command."""

import hashlib
import itertools
import uuid
from dataclasses import dataclass, field
from typing import Any

from esper.schemas import events, ids
from esper.schemas.assets import LayerEdge, LayerNode, Seed
from esper.schemas.events import Event
from esper.schemas.messages import OonaMessage

LAYERS = tuple(
    LayerNode(layer_id=name, kind="linear", num_features=8, num_parameters=72, num_seeds=2)
    for name in ("fc1", "fc2", "out")
)
EDGES = (LayerEdge(source="fc1", target="fc2"), LayerEdge(source="fc2", target="out"))
KERNEL = "ab" * 32


@dataclass
class RunMessages:
    """Builds a run's messages with their sequences, ids and causes. ``blueprint`` need not exist in the library."""

    run_id: str
    blueprint: str = "affine"
    incarnation: int = 1
    messages: list[OonaMessage] = field(default_factory=list)
    _sequence: int = -1

    def add_trainer_event(
        self, event: type[events.TrainerEvent], cause: uuid.UUID | None = None, **fields: Any
    ) -> uuid.UUID:
        self._sequence += 1
        origin = {"run_id": self.run_id, "incarnation": self.incarnation, "sequence": self._sequence}
        return self._add(event(**origin, **fields), ids.trainer_event_id(*origin.values()), cause)

    def add_decision(
        self, boundary: int, step: int, cause: uuid.UUID | None, **fields: Any
    ) -> tuple[uuid.UUID, uuid.UUID]:
        """Add a view and a decision; returns the ids of the decision and of the command that carries it out."""
        at = (self.run_id, self.incarnation, boundary)
        run = {"run_id": self.run_id, "incarnation": self.incarnation, "boundary": boundary}
        digest = hashlib.sha256(repr(at).encode()).hexdigest()
        self._add(events.ViewRecorded(**run, view_version=1, digest=digest, view_zstd="YWJj"), ids.view_id(*at), cause)
        chosen = {"probability": 0.9, "policy_id": "schedule", "policy_version": 1, "reason": "scheduled", **fields}
        decision = events.DecisionMade(**run, step=step, view_digest=digest, **chosen)
        decision_id = self._add(decision, ids.decision_id(*at), cause)
        return decision_id, ids.command_id(decision_id)

    def add_command(
        self, event: type[events.SeedCommand], decision: uuid.UUID, boundary: int, **fields: Any
    ) -> uuid.UUID:
        run = {"run_id": self.run_id, "incarnation": self.incarnation, "boundary": boundary}
        body = event(**run, decision_id=decision, expires_at_step=10_000, **fields)
        return self._add(body, ids.command_id(decision), decision)

    def add_transitions(self, seed: dict[str, Any], step: int, cause: uuid.UUID, *stages: str) -> uuid.UUID:
        """Add a transition between each two stages, one step apart, each caused by the one before it."""
        for before, after in itertools.pairwise(stages):
            cause = self.add_trainer_event(
                events.SeedTransitioned, cause, step=step, **seed, from_stage=before, to_stage=after, reason="schedule",
                blueprint_id=self.blueprint, kernel_sha256=KERNEL, num_parameters=16,
            )  # fmt: skip
            step += 1
        return cause

    def _add(self, event: Event, id: uuid.UUID, cause: uuid.UUID | None) -> uuid.UUID:
        self.messages.append(OonaMessage.of(event, id=id, source="test", causation_id=cause))
        return id


def grown_run_messages(run_id: str, blueprint: str = "affine") -> list[OonaMessage]:
    """Seed fc1:0 fossilizes; fc2:1 grafts, the process dies, incarnation 2 resumes it; a command for fc1:1 is rejected."""
    run = RunMessages(run_id, blueprint)
    run.add_trainer_event(
        events.RunStarted, step=0, model="Net", layers=LAYERS, edges=EDGES, boundary_steps=10, command_offset=0,
        hyperparameters={"lr": 0.1, "optimizer": "sgd", "nesterov": True, "epochs": 3},
    )  # fmt: skip
    first = {"layer_id": "fc1", "seed_id": 0}
    second = {"layer_id": "fc2", "seed_id": 1}
    ended = _add_germination(
        run,
        first,
        boundary=1,
        step=10,
        stages=("dormant", "germinated", "training", "grafting", "stabilizing", "evaluating"),
    )
    run.add_trainer_event(events.EpochCompleted, step=20, epoch=0, metrics={"val_accuracy": 0.5, "loss": None})
    decision, _ = run.add_decision(3, 30, None, action="fossilize", **first)
    command = run.add_command(events.FossilizeSeed, decision, 3, **first)
    ended = run.add_transitions(first, 31, command, "evaluating", "fossilized")
    run.add_trainer_event(
        events.FieldReported, ended, step=31, **first, blueprint_id=blueprint, outcome="fossilized",
        decision_id=ids.decision_id(run_id, 1, 1), command_id=ids.command_id(ids.decision_id(run_id, 1, 1)),
        method="before_after", metric="val_accuracy", before=0.5, after=0.625, germinated_at_step=11, num_parameters=16,
    )  # fmt: skip
    _add_germination(run, second, boundary=4, step=40, stages=("dormant", "germinated", "training", "grafting"))
    other = {"layer_id": "fc1", "seed_id": 1}
    decision, command = run.add_decision(6, 60, None, action="cull", **other)
    run.add_command(events.CullSeed, decision, 6, **other, expected_stage="training")
    run.add_trainer_event(
        events.CommandRejected, command, step=61, **other, command_id=command, reason="unexpected_stage"
    )
    run.add_trainer_event(
        events.FieldReported, None, step=70, **second, blueprint_id=blueprint, outcome="culled", decision_id=decision,
        command_id=command, method="before_after", metric="val_accuracy", before=0.625, after=0.25,
        germinated_at_step=41, num_parameters=16,
    )  # fmt: skip
    run.incarnation, run._sequence = 2, -1
    run.add_trainer_event(
        events.RunResumed, step=50, from_incarnation=1, epoch=0, command_offset=2,
        seeds=(
            Seed(**first, stage="fossilized", stage_since_step=31, alpha=1.0, blueprint_id=blueprint, kernel_sha256=KERNEL),
            Seed(**second, stage="grafting", stage_since_step=43, alpha=0.5, blueprint_id=blueprint, kernel_sha256=KERNEL),
        ),
    )  # fmt: skip
    run.add_trainer_event(events.EpochCompleted, step=60, epoch=1, metrics={"val_accuracy": 0.75})
    return run.messages


def _add_germination(
    run: RunMessages, seed: dict[str, Any], boundary: int, step: int, stages: tuple[str, ...]
) -> uuid.UUID:
    reached = run.add_trainer_event(
        events.BoundaryReached, step=step, boundary=boundary, epoch=0, last_sequences={"system.runs": 0}
    )
    decision, _ = run.add_decision(boundary, step, reached, action="germinate", blueprint_id=run.blueprint, **seed)
    command = run.add_command(
        events.GerminateSeed, decision, boundary, **seed, blueprint_id=run.blueprint, blueprint_version=3,
        kernel_sha256=KERNEL, kernel_size_bytes=9,
    )  # fmt: skip
    return run.add_transitions(seed, step + 1, command, *stages)
