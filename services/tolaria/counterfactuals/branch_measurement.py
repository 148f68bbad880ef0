"""Measures a fork: trains the branch that decides otherwise from the run's snapshot, and compares.

Pure except for the training: the same job gives the same numbers in any process. docs/design/reward.md has the
estimator.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from esper.connection.checkpoints.training_state import from_bytes, to_bytes
from esper.kasmina.kernels import LoadedKernel
from esper.schemas.enums import Action, SeedStage
from esper.schemas.events import ForkedPair
from esper.services.tolaria.counterfactuals.branch_trainer import (
    AppliedCommand,
    BranchTrainer,
    CommandSchedule,
    Snapshot,
    replay_commands,
)
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.run_costs import host_cost

PLACEBO = "noop"
"""The catalogue's module that adds nothing."""


@dataclass(eq=False, slots=True)
class ForkJob:
    """One decision whose effect is to be measured.

    Attributes:
        snapshot: of the run at the decision's boundary, before any command of that boundary.
        decided: the command that carried out the decision.
        kernel: of the adaptation.
        end_of_epoch: both branches are measured at the end of this epoch.
        commands: all that the run applied from the snapshot on, in order, ``decided`` among them.
        run_metric: the metric of the run itself at the horizon; None before that.
        run_step: the step at which it was measured.
    """

    snapshot: Snapshot
    decided: AppliedCommand
    kernel: LoadedKernel
    end_of_epoch: int
    commands: list[AppliedCommand] = field(default_factory=list)
    run_metric: float | None = None
    run_step: int = 0

    @property
    def is_placebo(self) -> bool:
        """Whether the adaptation adds nothing."""
        return self.kernel.spec.module == PLACEBO

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint or another process."""
        return {
            "snapshot": dict(self.snapshot),
            "decided": self.commands.index(self.decided),
            "kernel": AppliedCommand(0, Action.GERMINATE, "", 0, self.kernel).to_dict(),
            "end_of_epoch": self.end_of_epoch,
            "commands": [c.to_dict() for c in self.commands],
            "own": [self.run_metric, self.run_step],
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        commands = [AppliedCommand.from_dict(c) for c in saved["commands"]]
        kernel = AppliedCommand.from_dict(saved["kernel"]).kernel
        assert kernel is not None
        decided = commands[saved["decided"]]
        return cls(saved["snapshot"], decided, kernel, saved["end_of_epoch"], commands, *saved["own"])


@dataclass(frozen=True, slots=True)
class ForkMeasurement:
    """The result of a fork: the metric without and with the adaptation, each a mean over the draws."""

    before: float
    after: float
    fork: ForkedPair


def measure(trainer: TrainerSettings, job: ForkJob) -> ForkMeasurement:
    """Train the branches that the run itself is not, and compare.

    Raises:
        ContractError: a command that the run applied does not fit a branch, so the two cannot be compared.
    """
    pairs = [_measure_pair(trainer, job, draw) for draw in range(trainer.fork.num_batch_orders)]
    count, steps = len(pairs), job.run_step - job.decided.step
    before, after = (sum(values) / count for values in zip(*pairs, strict=True))
    variance = None
    if count > 1:
        variance = sum((a - b - (after - before)) ** 2 for b, a in pairs) / (count - 1) / count
    host = host_cost(trainer)
    fork = ForkedPair(
        horizon_steps=steps,
        num_draws=count,
        variance=variance,
        is_placebo=job.is_placebo,
        num_parameters_host=host.num_parameters,
        flops_added=host.flops_of(job.decided.layer_id, job.kernel),
        flops_host=host.flops,
    )
    return ForkMeasurement(before, after, fork)


def _measure_pair(trainer: TrainerSettings, job: ForkJob, draw: int) -> tuple[float, float]:
    """The metric without and with the adaptation, on the batches of one draw; for a placebo, of two."""
    actual_draw, opposite_draw = (2 * draw, 2 * draw + 1) if job.is_placebo else (draw, draw)
    actual = job.run_metric if draw == 0 else None
    if actual is None:
        actual = _train_branch(trainer, job, replay_commands(job.commands), actual_draw)
    opposite = _train_branch(trainer, job, opposite_schedule(job), opposite_draw)
    return (actual, opposite) if job.decided.action is Action.CULL else (opposite, actual)


def _train_branch(trainer: TrainerSettings, job: ForkJob, schedule: CommandSchedule, draw: int) -> float:
    return BranchTrainer.from_snapshot(trainer, job.snapshot, draw=draw).train(job.end_of_epoch, schedule)


def opposite_schedule(job: ForkJob) -> CommandSchedule:
    """The schedule of the counterfactual branch: the run's commands to other seeds, and the opposite for this seed.

    Instead of germinating, the seed stays dormant; instead of becoming permanent, it is culled; instead of being
    culled, it continues, and becomes permanent as soon as it is in EVALUATING.
    """
    seed = job.decided.seed

    def schedule(branch: BranchTrainer) -> Iterable[AppliedCommand]:
        for command in job.commands:
            if command.step != branch.step:
                continue
            if command.seed != seed:
                yield command
            elif command is job.decided and command.action is Action.FOSSILIZE:
                yield AppliedCommand(branch.step, Action.CULL, *seed)
        is_kept = job.decided.action is Action.CULL
        if is_kept and branch.model.seed(*seed).stage is SeedStage.EVALUATING:
            yield AppliedCommand(branch.step, Action.FOSSILIZE, *seed)

    return schedule


def pack_job(job: ForkJob) -> bytes:
    """A job as bytes, for another process."""
    return to_bytes(job.to_dict()).numpy().tobytes()


def measure_packed(trainer: TrainerSettings, packed: bytes) -> ForkMeasurement:
    """``measure`` of the result of ``pack_job``."""
    return measure(trainer, ForkJob.from_dict(from_bytes(torch.frombuffer(bytearray(packed), dtype=torch.uint8))))
