"""system.runs: the course of a training run, as the trainer tells it."""

from typing import Literal

from pydantic import Field

from esper.schemas.assets import LayerEdge, LayerNode, Seed, TrainingResults
from esper.schemas.base import (
    Boundary,
    Count,
    Epoch,
    Incarnation,
    Name,
    Positive,
    Remark,
    Scalar,
    Sequence,
    Sha256,
    Text,
)
from esper.schemas.enums import RunStatus
from esper.schemas.events.base import TrainerEvent


class RunStarted(TrainerEvent):
    """A new run, with the graph of its model. Always incarnation 1, sequence 0, step 0.

    ``boundary_steps`` is the distance of the boundaries in optimizer steps.
    ``command_offset`` is the position in the run's command partition taken before this event
    was written.
    """

    type: Literal["esper.run.started.v2"] = "esper.run.started.v2"
    model: Name
    layers: tuple[LayerNode, ...]
    edges: tuple[LayerEdge, ...]
    boundary_steps: Positive
    command_offset: Count
    hyperparameters: dict[Text, Scalar] = Field(default_factory=dict)


class RunResumed(TrainerEvent):
    """A new incarnation takes over from a checkpoint; the old one is superseded beyond ``step``.

    ``seeds`` are all seeds that were not dormant at the checkpoint, so that an incarnation
    can be read without the ones before it.
    """

    type: Literal["esper.run.resumed.v1"] = "esper.run.resumed.v1"
    from_incarnation: Incarnation
    epoch: Epoch
    seeds: tuple[Seed, ...]
    command_offset: Count


class BoundaryReached(TrainerEvent):
    """The trainer passed a boundary; it goes on without waiting.

    ``last_sequences`` has the last sequence sent on each topic up to here (topics without
    an event are missing): when the projected rows have reached them, the boundary is complete.
    """

    type: Literal["esper.boundary.reached.v1"] = "esper.boundary.reached.v1"
    boundary: Boundary
    epoch: Epoch
    last_sequences: dict[Text, Sequence]


class EpochCompleted(TrainerEvent):
    """An epoch ended. A metric that is not finite is null."""

    type: Literal["esper.epoch.completed.v1"] = "esper.epoch.completed.v1"
    epoch: Epoch
    metrics: dict[Text, float | None]


class CheckpointSaved(TrainerEvent):
    """A checkpoint is on disk, complete and verified. ``command_offset`` is the position in it."""

    type: Literal["esper.checkpoint.saved.v1"] = "esper.checkpoint.saved.v1"
    epoch: Epoch
    sha256: Sha256
    size_bytes: Positive
    command_offset: Count


class TelemetryGap(TrainerEvent):
    """Telemetry of the steps ``from_step`` to ``step`` is missing: ``num_lost`` records.

    Of a process that was killed nobody knows exactly what was in its memory: told by the incarnation
    after it, ``num_lost`` is the most that it can be.
    """

    type: Literal["esper.telemetry.lost.v1"] = "esper.telemetry.lost.v1"
    from_step: Count
    num_lost: Positive


class RunEnded(TrainerEvent):
    """Nothing comes after this in the incarnation. ``results`` where the run got that far."""

    type: Literal["esper.run.ended.v1"] = "esper.run.ended.v1"
    status: Literal[RunStatus.COMPLETED, RunStatus.INTERRUPTED, RunStatus.FAILED]
    results: TrainingResults | None = None
    detail: Remark = ""
