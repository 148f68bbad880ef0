"""A run that grew, as events: every topic that its story touches, with causes, a resumed process and a refused command."""

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
class Teller:
    """Counts what it tells. ``blueprint`` is what germinates; it need not exist."""

    run_id: str
    blueprint: str = "affine"
    incarnation: int = 1
    told: list[OonaMessage] = field(default_factory=list)
    _sequence: int = -1

    def trainer(self, event: type[events.TrainerEvent], cause: uuid.UUID | None = None, **fields: Any) -> uuid.UUID:
        self._sequence += 1
        run = {"run_id": self.run_id, "incarnation": self.incarnation, "sequence": self._sequence}
        return self._tell(event(**run, **fields), ids.trainer_event_id(*run.values()), cause)

    def decide(self, boundary: int, step: int, cause: uuid.UUID | None, **fields: Any) -> tuple[uuid.UUID, uuid.UUID]:
        """A view and a decision; gives the ids of the decision and of the command that would carry it out."""
        at = (self.run_id, self.incarnation, boundary)
        run = {"run_id": self.run_id, "incarnation": self.incarnation, "boundary": boundary}
        digest = hashlib.sha256(repr(at).encode()).hexdigest()
        self._tell(events.ViewRecorded(**run, view_version=1, digest=digest, view_zstd="YWJj"), ids.view_id(*at), cause)
        chosen = {"probability": 0.9, "policy_id": "schedule", "policy_version": 1, "reason": "its turn", **fields}
        decision = events.DecisionMade(**run, step=step, view_digest=digest, **chosen)
        decision_id = self._tell(decision, ids.decision_id(*at), cause)
        return decision_id, ids.command_id(decision_id)

    def command(self, event: type[events.SeedCommand], decision: uuid.UUID, boundary: int, **fields: Any) -> uuid.UUID:
        run = {"run_id": self.run_id, "incarnation": self.incarnation, "boundary": boundary}
        body = event(**run, decision_id=decision, expires_at_step=10_000, **fields)
        return self._tell(body, ids.command_id(decision), decision)

    def move(self, seed: dict[str, Any], step: int, cause: uuid.UUID, *stages: str) -> uuid.UUID:
        """Through the stages, each caused by the one before it."""
        for before, after in itertools.pairwise(stages):
            cause = self.trainer(
                events.SeedTransitioned, cause, step=step, **seed, from_stage=before, to_stage=after, reason="schedule",
                blueprint_id=self.blueprint, kernel_sha256=KERNEL, num_parameters=16,
            )  # fmt: skip
            step += 1
        return cause

    def _tell(self, event: Event, id: uuid.UUID, cause: uuid.UUID | None) -> uuid.UUID:
        self.told.append(OonaMessage.of(event, id=id, source="test", causation_id=cause))
        return id


def grown_run(run_id: str, blueprint: str = "affine") -> list[OonaMessage]:
    """fc1:0 grows for good; fc2:1 grafts, its process dies, and it lives on in incarnation 2; fc1:1 is refused."""
    teller = Teller(run_id, blueprint)
    teller.trainer(
        events.RunStarted, step=0, model="Net", layers=LAYERS, edges=EDGES, boundary_steps=10, command_offset=0,
        hyperparameters={"lr": 0.1, "optimizer": "sgd", "nesterov": True, "epochs": 3},
    )  # fmt: skip
    first = {"layer_id": "fc1", "seed_id": 0}
    second = {"layer_id": "fc2", "seed_id": 1}
    ended = _germinate(
        teller,
        first,
        boundary=1,
        step=10,
        stages=("dormant", "germinated", "training", "grafting", "stabilizing", "evaluating"),
    )
    teller.trainer(events.EpochCompleted, step=20, epoch=0, metrics={"val_accuracy": 0.5, "loss": None})
    decision, _ = teller.decide(3, 30, None, action="fossilize", **first)
    command = teller.command(events.FossilizeSeed, decision, 3, **first)
    ended = teller.move(first, 31, command, "evaluating", "fossilized")
    teller.trainer(
        events.FieldReported, ended, step=31, **first, blueprint_id=blueprint, outcome="fossilized",
        decision_id=ids.decision_id(run_id, 1, 1), command_id=ids.command_id(ids.decision_id(run_id, 1, 1)),
        method="before_after", metric="val_accuracy", before=0.5, after=0.625, germinated_at_step=11, num_parameters=16,
    )  # fmt: skip
    _germinate(teller, second, boundary=4, step=40, stages=("dormant", "germinated", "training", "grafting"))
    other = {"layer_id": "fc1", "seed_id": 1}
    decision, command = teller.decide(6, 60, None, action="cull", **other)
    teller.command(events.CullSeed, decision, 6, **other, expected_stage="training")
    teller.trainer(events.CommandRejected, command, step=61, **other, command_id=command, reason="unexpected_stage")
    teller.trainer(
        events.FieldReported, None, step=70, **second, blueprint_id=blueprint, outcome="culled", decision_id=decision,
        command_id=command, method="before_after", metric="val_accuracy", before=0.625, after=0.25,
        germinated_at_step=41, num_parameters=16,
    )  # fmt: skip
    teller.incarnation, teller._sequence = 2, -1
    teller.trainer(
        events.RunResumed, step=50, from_incarnation=1, epoch=0, command_offset=2,
        seeds=(
            Seed(**first, stage="fossilized", stage_since_step=31, alpha=1.0, blueprint_id=blueprint, kernel_sha256=KERNEL),
            Seed(**second, stage="grafting", stage_since_step=43, alpha=0.5, blueprint_id=blueprint, kernel_sha256=KERNEL),
        ),
    )  # fmt: skip
    teller.trainer(events.EpochCompleted, step=60, epoch=1, metrics={"val_accuracy": 0.75})
    return teller.told


def _germinate(teller: Teller, seed: dict[str, Any], boundary: int, step: int, stages: tuple[str, ...]) -> uuid.UUID:
    reached = teller.trainer(
        events.BoundaryReached, step=step, boundary=boundary, epoch=0, last_sequences={"system.runs": 0}
    )
    decision, _ = teller.decide(boundary, step, reached, action="germinate", blueprint_id=teller.blueprint, **seed)
    command = teller.command(
        events.GerminateSeed, decision, boundary, **seed, blueprint_id=teller.blueprint, blueprint_version=3,
        kernel_sha256=KERNEL, kernel_size_bytes=9,
    )  # fmt: skip
    return teller.move(seed, step + 1, command, *stages)
