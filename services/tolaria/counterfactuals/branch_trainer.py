"""A training run without a link to the bus, started anew or from a run's snapshot, with commands from a schedule.

Owns the model, the optimizer and the position in the data. Invariant: a branch that starts from a run's snapshot and
gets the commands that the run applied after it ends as the run did, to the bit.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from esper.connection.checkpoints.training_state import TrainingState, load_rank_state, rank_state
from esper.errors import ContractError
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.lifecycle import Transition
from esper.kasmina.packing import pack_kernel, unpack_kernel
from esper.schemas.enums import Action
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.training_loop import (
    accuracy,
    load_images,
    make_model,
    make_optimizer,
    prepare_torch,
    train_epoch,
)

SeedKey = tuple[str, int]
Snapshot = Mapping[str, Any]
"""Model, seeds, optimizer, random state and position in the data, as plain values and copied tensors."""


@dataclass(frozen=True, eq=False, slots=True)
class AppliedCommand:
    """A command that a run applied at the boundary of ``step``; only GERMINATE has a ``kernel``."""

    step: int
    action: Action
    layer_id: str
    seed_id: int
    kernel: LoadedKernel | None = None

    @property
    def seed(self) -> SeedKey:
        """The seed that it changes."""
        return self.layer_id, self.seed_id

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        kernel = self.kernel
        packed = None if kernel is None else [pack_kernel(kernel, kernel.weights), kernel.kernel_sha256]
        return {"step": self.step, "action": str(self.action), "seed": [*self.seed], "kernel": packed}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        kernel = None if saved["kernel"] is None else unpack_kernel(*saved["kernel"])
        layer_id, seed_id = saved["seed"]
        return cls(saved["step"], Action(saved["action"]), layer_id, seed_id, kernel)


CommandSchedule = Callable[["BranchTrainer"], Iterable[AppliedCommand]]
"""The commands for the boundary that a branch is at; called once per boundary, before stages advance."""


def replay_commands(commands: Sequence[AppliedCommand]) -> CommandSchedule:
    """A schedule that applies recorded commands at their steps."""
    return lambda branch: [c for c in commands if c.step == branch.step]


class BranchTrainer:
    """Trains one branch.

    Args:
        draw: which batches it trains on; 0 are the run's own (``epoch_batches``).

    Attributes:
        step, epoch, step_in_epoch: completed optimizer steps; the current epoch; completed steps in it.
        metrics: validation accuracy at the end of each epoch that this branch completed.
        moves: every transition that this branch made, with its step.
    """

    def __init__(self, trainer: TrainerSettings, *, draw: int = 0) -> None:
        prepare_torch(trainer)
        self.data = load_images(trainer)
        self.model = make_model(trainer, self.data.image_shape)
        self.training = TrainingState(self.model, make_optimizer(trainer, self.model))
        self.step = self.epoch = self.step_in_epoch = 0
        self.metrics: dict[int, float] = {}
        self.moves: list[tuple[int, Transition]] = []
        self._trainer = trainer
        self._draw = draw
        self._is_at_boundary = False

    @classmethod
    def from_snapshot(cls, trainer: TrainerSettings, snapshot: Snapshot, *, draw: int = 0) -> Self:
        """Continue from ``snapshot_of``, which is taken at a boundary, before its commands."""
        branch, saved = cls(trainer, draw=draw), copy.deepcopy(dict(snapshot))  # the optimizer updates what it loads
        branch.training.load_dict(saved)
        load_rank_state(saved["own"])
        if draw:
            torch.manual_seed(torch.initial_seed() + draw)
        branch.step, branch.epoch, branch.step_in_epoch = saved["step"], saved["epoch"], saved["step_in_epoch"]
        branch._is_at_boundary = True
        return branch

    def train(self, end_of_epoch: int, schedule: CommandSchedule) -> float:
        """Train to the end of this epoch. Returns the metric there.

        Raises:
            ContractError: a command cannot be applied in this branch, or it is past this epoch.
        """
        if self._is_at_boundary:
            self._is_at_boundary = False
            self._pass_boundary(schedule)
        while self.epoch <= end_of_epoch:
            train_epoch(
                self.model,
                self.training.optimizer,
                self.data,
                self._trainer,
                self.epoch,
                lambda: self._after_step(schedule),
                first_batch=self.step_in_epoch,
                draw=self._draw,
            )
            self.metrics[self.epoch] = accuracy(self.model, self.data)
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        if end_of_epoch not in self.metrics:
            raise ContractError(f"the branch is in epoch {self.epoch}, past epoch {end_of_epoch}; start another one")
        return self.metrics[end_of_epoch]

    def grow_from_start(self, grown: Sequence[AppliedCommand]) -> None:
        """Before the first step: make these germinations permanent, as if the network always had them.

        Raises:
            ContractError: the branch has trained already, or a kernel does not fit.
        """
        if self.step:
            raise ContractError(f"the branch is at step {self.step}; grow it before its first step")
        for command in grown:
            self._apply(self._plan_of(command), 0, command.kernel)
        schedule = self._trainer.schedule
        evaluating_at = schedule.germinated + schedule.training + schedule.grafting + schedule.stabilizing
        for boundary in range(1, evaluating_at + 1):
            for seed in self.model.awake.values():
                seed.has_run = True  # no step runs in between
            for plan in self.model.plan_advance(boundary):
                self._apply(plan, boundary, None)
        for command in grown:
            self._apply(self.model.plan_fossilize(*command.seed), evaluating_at, None)

    def snapshot(self) -> Snapshot:
        """The current state; for a schedule that forks here."""
        return snapshot_of(self.training, step=self.step, epoch=self.epoch, step_in_epoch=self.step_in_epoch)

    def _after_step(self, schedule: CommandSchedule) -> None:
        self.step += 1
        self.step_in_epoch += 1
        self.model.on_step(self.step)
        if self.step % self.model.boundary_steps == 0:
            self._pass_boundary(schedule)

    def _pass_boundary(self, schedule: CommandSchedule) -> None:
        boundary = self.step // self.model.boundary_steps
        for command in schedule(self):
            self._apply(self._plan_of(command), boundary, command.kernel)
        for plan in self.model.plan_advance(boundary):
            self._apply(plan, boundary, None)

    def _plan_of(self, command: AppliedCommand) -> Transition:
        if command.action is Action.GERMINATE and command.kernel is not None:
            return self.model.plan_germinate(*command.seed, command.kernel)
        if command.action is Action.CULL:
            return self.model.plan_cull(*command.seed)
        if command.action is Action.FOSSILIZE:
            return self.model.plan_fossilize(*command.seed)
        raise ContractError(f"{command.action} cannot be applied in a branch")

    def _apply(self, plan: Transition, boundary: int, kernel: LoadedKernel | None) -> None:
        self.model.apply_transition(
            plan, step=self.step, boundary=boundary, kernel=kernel, optimizer=self.training.optimizer
        )
        self.moves.append((self.step, plan))


def snapshot_of(training: TrainingState, *, step: int, epoch: int, step_in_epoch: int) -> Snapshot:
    """The state of a run at this moment. It costs a copy of the model and the optimizer's state."""
    position = {"step": step, "epoch": epoch, "step_in_epoch": step_in_epoch}
    return {**copy.deepcopy(training.to_dict()), **position, "own": rank_state(None)}
