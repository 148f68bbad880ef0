"""system.runs: the progress of a training run, reported by its trainer."""

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
    """A run started. Has the graph of its model; always incarnation 1, sequence 0, step 0.

    ``boundary_steps`` is the distance between boundaries in optimizer steps. ``command_offset`` is the end of the
    run's command partition before this event was written.
    """

    type: Literal["esper.run.started.v2"] = "esper.run.started.v2"
    model: Name
    layers: tuple[LayerNode, ...]
    edges: tuple[LayerEdge, ...]
    boundary_steps: Positive
    command_offset: Count
    hyperparameters: dict[Text, Scalar] = Field(default_factory=dict)


class RunResumed(TrainerEvent):
    """A new incarnation resumed from a checkpoint; it supersedes the old one beyond ``step``.

    ``seeds`` are all seeds that were not dormant at the checkpoint, so that readers need no older incarnation.
    """

    type: Literal["esper.run.resumed.v1"] = "esper.run.resumed.v1"
    from_incarnation: Incarnation
    epoch: Epoch
    seeds: tuple[Seed, ...]
    command_offset: Count


class BoundaryReached(TrainerEvent):
    """The trainer reached a boundary. It continues without waiting for a decision.

    ``last_sequences`` maps each topic to the last sequence sent on it so far; topics without an event are left out.
    The boundary is complete once the projected rows have reached them.
    """

    type: Literal["esper.boundary.reached.v1"] = "esper.boundary.reached.v1"
    boundary: Boundary
    epoch: Epoch
    last_sequences: dict[Text, Sequence]


class EpochCompleted(TrainerEvent):
    """An epoch ended. A metric is null where it is not finite."""

    type: Literal["esper.epoch.completed.v1"] = "esper.epoch.completed.v1"
    epoch: Epoch
    metrics: dict[Text, float | None]


class CheckpointSaved(TrainerEvent):
    """A checkpoint is on disk, complete and verified. ``command_offset`` is the command position that it holds."""

    type: Literal["esper.checkpoint.saved.v1"] = "esper.checkpoint.saved.v1"
    epoch: Epoch
    sha256: Sha256
    size_bytes: Positive
    command_offset: Count


class TelemetryGap(TrainerEvent):
    """Telemetry of the steps ``from_step`` to ``step`` is missing: ``num_lost`` records.

    The memory of a killed process cannot be counted: its next incarnation reports the largest possible ``num_lost``.
    """

    type: Literal["esper.telemetry.lost.v1"] = "esper.telemetry.lost.v1"
    from_step: Count
    num_lost: Positive


class RunEnded(TrainerEvent):
    """The last event of an incarnation. ``results`` is null where the run did not get that far."""

    type: Literal["esper.run.ended.v1"] = "esper.run.ended.v1"
    status: Literal[RunStatus.COMPLETED, RunStatus.INTERRUPTED, RunStatus.FAILED]
    results: TrainingResults | None = None
    detail: Remark = ""
