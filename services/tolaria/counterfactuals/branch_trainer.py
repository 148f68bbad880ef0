"""BranchTrainer: a training run without a link. It is begun anew, or from a run's snapshot, and told what to do.

Owns model, optimizer and the place in the data. Invariant: a line that is given a run's snapshot and
the commands that the run applied after it ends as the run did, to the bit.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from esper.connection.checkpoints.training_state import Training, load_own_state, own_state
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
    one_epoch,
    prepare_torch,
)

SeedKey = tuple[str, int]
Snapshot = Mapping[str, Any]
"""Model, seeds, optimizer, chance and the place in the data, as plain values and tensors of its own."""


@dataclass(frozen=True, eq=False, slots=True)
class Applied:
    """A command that a run applied at the boundary of ``step``; ``kernel`` goes with GERMINATE alone."""

    step: int
    action: Action
    layer_id: str
    seed_id: int
    kernel: LoadedKernel | None = None

    @property
    def seed(self) -> SeedKey:
        """Whom it is for."""
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


Steer = Callable[["BranchTrainer"], Iterable[Applied]]
"""What to do at the boundary that a line has come to; called once for each, before stages advance."""


def follow(commands: Sequence[Applied]) -> Steer:
    """Do what was recorded, at its steps."""
    return lambda line: [c for c in commands if c.step == line.step]


class BranchTrainer:
    """See the module.

    Args:
        draw: which batches it trains on; 0 are the run's own (``epoch_batches``).

    Attributes:
        step, epoch, step_in_epoch: optimizer steps done; the epoch under way; those done in it.
        metrics: validation accuracy at the end of each epoch that this line ended itself.
        moves: every transition that this line made, with its step.
    """

    def __init__(self, trainer: TrainerSettings, *, draw: int = 0) -> None:
        prepare_torch(trainer)
        self.data = load_images(trainer)
        self.model = make_model(trainer, self.data.image_shape)
        self.training = Training(self.model, make_optimizer(trainer, self.model))
        self.step = self.epoch = self.step_in_epoch = 0
        self.metrics: dict[int, float] = {}
        self.moves: list[tuple[int, Transition]] = []
        self._trainer = trainer
        self._draw = draw
        self._is_at_boundary = False

    @classmethod
    def from_snapshot(cls, trainer: TrainerSettings, snapshot: Snapshot, *, draw: int = 0) -> Self:
        """Go on where ``snapshot_of`` was taken: in the middle of a boundary, before its commands."""
        line, saved = cls(trainer, draw=draw), copy.deepcopy(dict(snapshot))  # an optimizer goes on in what it loads
        line.training.load_dict(saved)
        load_own_state(saved["own"])
        if draw:
            torch.manual_seed(torch.initial_seed() + draw)
        line.step, line.epoch, line.step_in_epoch = saved["step"], saved["epoch"], saved["step_in_epoch"]
        line._is_at_boundary = True
        return line

    def train(self, end_of_epoch: int, steer: Steer) -> float:
        """Train to the end of this epoch; gives the metric there.

        Raises:
            ContractError: a command cannot be applied in this line.
        """
        if self._is_at_boundary:
            self._is_at_boundary = False
            self._pass_boundary(steer)
        while self.epoch <= end_of_epoch:
            one_epoch(
                self.model,
                self.training.optimizer,
                self.data,
                self._trainer,
                self.epoch,
                lambda: self._after_step(steer),
                first_batch=self.step_in_epoch,
                draw=self._draw,
            )
            self.metrics[self.epoch] = accuracy(self.model, self.data)
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        if end_of_epoch not in self.metrics:
            raise ContractError(f"the line is past epoch {end_of_epoch} already: it is at {self.epoch}")
        return self.metrics[end_of_epoch]

    def grow_at_once(self, grown: Sequence[Applied]) -> None:
        """Before the first step: these germinations stand in the network as if they had always, permanent.

        Raises:
            ContractError: the line is on its way already, or a kernel does not fit.
        """
        if self.step:
            raise ContractError(f"the line is at step {self.step} already")
        for command in grown:
            self._apply(self._plan_of(command), 0, command.kernel)
        schedule = self._trainer.schedule
        until_judged = schedule.germinated + schedule.training + schedule.grafting + schedule.stabilizing
        for boundary in range(1, until_judged + 1):
            for seed in self.model.awake.values():
                seed.has_run = True  # no step is done meanwhile
            for plan in self.model.plan_advance(boundary):
                self._apply(plan, boundary, None)
        for command in grown:
            self._apply(self.model.plan_fossilize(*command.seed), until_judged, None)

    def snapshot(self) -> Snapshot:
        """All of it as it is now; for a ``steer`` that wants to fork here."""
        return snapshot_of(self.training, step=self.step, epoch=self.epoch, step_in_epoch=self.step_in_epoch)

    def _after_step(self, steer: Steer) -> None:
        self.step += 1
        self.step_in_epoch += 1
        self.model.on_step(self.step)
        if self.step % self.model.boundary_steps == 0:
            self._pass_boundary(steer)

    def _pass_boundary(self, steer: Steer) -> None:
        boundary = self.step // self.model.boundary_steps
        for command in steer(self):
            self._apply(self._plan_of(command), boundary, command.kernel)
        for plan in self.model.plan_advance(boundary):
            self._apply(plan, boundary, None)

    def _plan_of(self, command: Applied) -> Transition:
        if command.action is Action.GERMINATE and command.kernel is not None:
            return self.model.plan_germinate(*command.seed, command.kernel)
        if command.action is Action.CULL:
            return self.model.plan_cull(*command.seed)
        if command.action is Action.FOSSILIZE:
            return self.model.plan_fossilize(*command.seed)
        raise ContractError(f"{command.action} is no command that a line can apply")

    def _apply(self, plan: Transition, boundary: int, kernel: LoadedKernel | None) -> None:
        self.model.apply_transition(
            plan, step=self.step, boundary=boundary, kernel=kernel, optimizer=self.training.optimizer
        )
        self.moves.append((self.step, plan))


def snapshot_of(training: Training, *, step: int, epoch: int, step_in_epoch: int) -> Snapshot:
    """A run as it is at this moment. What it costs is a copy of all that it holds."""
    place = {"step": step, "epoch": epoch, "step_in_epoch": step_in_epoch}
    return {**copy.deepcopy(training.to_dict()), **place, "own": own_state(None)}
