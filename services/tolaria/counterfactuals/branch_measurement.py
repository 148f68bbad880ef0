"""Branches of a fork: what else could have been decided, trained from the run's snapshot.

Pure but for the training itself: the same job gives the same numbers in any process. docs/design/reward.md has
the estimator.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from esper.connection.checkpoints.training_state import from_bytes, to_bytes
from esper.kasmina.kernels import LoadedKernel
from esper.schemas.enums import Action, SeedStage
from esper.schemas.events import ForkedPair
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand, BranchTrainer, Snapshot, CommandSchedule, replay_commands
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.run_costs import host_cost

PLACEBO = "noop"
"""The catalogue's module that adds nothing."""


@dataclass(eq=False, slots=True)
class ForkJob:
    """One decision whose effect is to be measured.

    Attributes:
        snapshot: of the run at the decision's boundary, before any command of that boundary.
        decided: the command that carried the decision out.
        kernel: what the adaptation adds.
        end_of_epoch: both branches are measured at the end of this epoch.
        commands: all that the run applied from the snapshot on, in order, ``decided`` among them.
        own_value: the metric of the run itself at the horizon; None before it is there.
        own_step: the step at which it was taken.
    """

    snapshot: Snapshot
    decided: AppliedCommand
    kernel: LoadedKernel
    end_of_epoch: int
    commands: list[AppliedCommand] = field(default_factory=list)
    own_value: float | None = None
    own_step: int = 0

    @property
    def is_placebo(self) -> bool:
        """Whether what germinates adds nothing."""
        return self.kernel.spec.module == PLACEBO

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint or another process."""
        return {
            "snapshot": dict(self.snapshot),
            "decided": self.commands.index(self.decided),
            "kernel": AppliedCommand(0, Action.GERMINATE, "", 0, self.kernel).to_dict(),
            "end_of_epoch": self.end_of_epoch,
            "commands": [c.to_dict() for c in self.commands],
            "own": [self.own_value, self.own_step],
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
class Measured:
    """What a fork came to: means over its draws of the metric without the adaptation and with it."""

    before: float
    after: float
    fork: ForkedPair


def measure(trainer: TrainerSettings, job: ForkJob) -> Measured:
    """Train the branches that the run itself is not, and compare.

    Raises:
        ContractError: a command that the run applied does not fit a branch: the two cannot be compared.
    """
    pairs = [_pair(trainer, job, draw) for draw in range(trainer.fork.num_batch_orders)]
    count, steps = len(pairs), job.own_step - job.decided.step
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
    return Measured(before, after, fork)


def _pair(trainer: TrainerSettings, job: ForkJob, draw: int) -> tuple[float, float]:
    """The metric without and with the adaptation, on the batches of one draw; a placebo's on those of two."""
    own_draw, other_draw = (2 * draw, 2 * draw + 1) if job.is_placebo else (draw, draw)
    own = job.own_value if draw == 0 else None
    if own is None:
        own = _value(trainer, job, replay_commands(job.commands), own_draw)
    other = _value(trainer, job, opposite_schedule(job), other_draw)
    return (own, other) if job.decided.action is Action.CULL else (other, own)


def _value(trainer: TrainerSettings, job: ForkJob, steer: CommandSchedule, draw: int) -> float:
    return BranchTrainer.from_snapshot(trainer, job.snapshot, draw=draw).train(job.end_of_epoch, steer)


def opposite_schedule(job: ForkJob) -> CommandSchedule:
    """What the branch does that the run is not: all that the run did to other seeds, and with this seed the opposite.

    Instead of germinating it stays dormant; instead of becoming permanent it is culled; instead of
    being culled it goes on, and becomes permanent as soon as it is in EVALUATING.
    """
    seed = job.decided.seed

    def steer(line: BranchTrainer) -> Iterable[AppliedCommand]:
        for command in job.commands:
            if command.step != line.step:
                continue
            if command.seed != seed:
                yield command
            elif command is job.decided and command.action is Action.FOSSILIZE:
                yield AppliedCommand(line.step, Action.CULL, *seed)
        is_kept = job.decided.action is Action.CULL
        if is_kept and line.model.seed(*seed).stage is SeedStage.EVALUATING:
            yield AppliedCommand(line.step, Action.FOSSILIZE, *seed)

    return steer


def pack_job(job: ForkJob) -> bytes:
    """A job on its way to another process."""
    return to_bytes(job.to_dict()).numpy().tobytes()


def measure_packed(trainer: TrainerSettings, packed: bytes) -> Measured:
    """``measure`` of what ``pack_job`` made."""
    return measure(trainer, ForkJob.from_dict(from_bytes(torch.frombuffer(bytearray(packed), dtype=torch.uint8))))
