"""The cost of a run: the size of its network, and the FLOPs of its training.

FLOPs count two per multiply-add (``torch.utils.flop_counter``; for kernels the catalogue, which counts alike).
A training step on N images counts 3 N forward passes: the backward pass costs about two (Kaplan et al.,
*Scaling Laws for Neural Language Models*, 2020, section 2.1). Optimizer and health signals are not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.connection.commands import ReceivedCommand
from esper.connection.events.journal import Cause
from esper.kasmina.catalogue import cost_of
from esper.kasmina.distributed import Move
from esper.kasmina.kernels import LoadedKernel
from esper.schemas.enums import Action, SeedStage
from esper.schemas.lifecycle import EMBARGO_STAGES
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand, SeedKey
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.training_loop import TARGETS, load_images, make_network

PASSES_PER_STEP = 3


@dataclass(frozen=True, slots=True)
class HostCost:
    """The cost of a host without seeds.

    Attributes:
        flops: of one forward pass over one image.
        outputs: the number of output values for one image, by layer that can hold seeds.
    """

    num_parameters: int
    flops: int
    outputs: Mapping[str, int]

    def flops_of(self, layer_id: str, kernel: LoadedKernel) -> int:
        """The FLOPs that a kernel adds to a forward pass over one image."""
        positions = self.outputs[layer_id] // kernel.num_features
        return cost_of(kernel.spec, kernel.kind, kernel.num_features).flops(positions)


def host_cost(trainer: TrainerSettings) -> HostCost:
    """Measure the host of the settings with one pass over one image. Random generators keep their state."""
    data = load_images(trainer)
    with torch.random.fork_rng(devices=[]):
        net = make_network(trainer, data.image_shape).eval()
    outputs: dict[str, int] = {}

    def record_output(name: str, layer: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            outputs[name] = output.numel()

        return layer.register_forward_hook(hook)

    hooks = [record_output(name, layer) for name, layer in net.named_modules() if isinstance(layer, TARGETS)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(data.val_x[:1])
    for hook in hooks:
        hook.remove()
    return HostCost(sum(p.numel() for p in net.parameters()), counter.get_total_flops(), outputs)


@dataclass(frozen=True, slots=True)
class RunCost:
    """The cost of a run. ``grown``: the kernels of its final network, as the germinations that create them."""

    num_parameters_host: int
    num_parameters: int
    training_flops: float
    grown: tuple[AppliedCommand, ...] = ()


@dataclass(eq=False, slots=True)
class CostLedger:
    """Counts the cost of a run, boundary by boundary; an observer of the run.

    A seed costs its kernel's FLOPs from its first training step until it is cancelled or culled.
    """

    trainer: TrainerSettings
    host: HostCost
    _kernels: dict[SeedKey, LoadedKernel] = field(default_factory=dict)
    _active_flops: dict[SeedKey, int] = field(default_factory=dict)
    _flops: float = 0.0
    _num_steps: int = 0

    def before_commands(self, commands: Sequence[ReceivedCommand], step: int) -> None:
        """Counts nothing."""

    def applied(self, command: ReceivedCommand, transition: Cause, step: int) -> None:
        """Counts nothing: ``boundary_passed`` has the transition."""

    def boundary_passed(self, moves: Sequence[Move]) -> None:
        """Count the steps since the last boundary, with the seeds that were active in them."""
        self._count(self.trainer.link.boundary_steps)
        for move in moves:
            plan, seed = move.plan, (move.plan.layer_id, move.plan.seed_id)
            if move.kernel is not None:
                self._kernels[seed] = move.kernel
            if plan.to_stage is SeedStage.TRAINING:
                self.add_seed(seed, self._kernels[seed])
            elif plan.to_stage in EMBARGO_STAGES:
                self._active_flops.pop(seed, None)

    def add_seed(self, seed: SeedKey, kernel: LoadedKernel) -> None:
        """Count this seed in every step from here on."""
        self._kernels[seed] = kernel
        self._active_flops[seed] = self.host.flops_of(seed[0], kernel)

    def total(self, num_steps: int) -> RunCost:
        """The cost after ``num_steps`` in total, including those after the last boundary."""
        self._count(num_steps - self._num_steps)
        kernels = {seed: self._kernels[seed] for seed in sorted(self._active_flops)}
        added = sum(cost_of(k.spec, k.kind, k.num_features).num_parameters for k in kernels.values())
        grown = tuple(AppliedCommand(0, Action.GERMINATE, *seed, kernel) for seed, kernel in kernels.items())
        return RunCost(self.host.num_parameters, self.host.num_parameters + added, self._flops, grown)

    def _count(self, num_steps: int) -> None:
        forward = self.host.flops + sum(self._active_flops.values())
        self._flops += PASSES_PER_STEP * self.trainer.batch_size * num_steps * forward
        self._num_steps += num_steps


def cost_of_steps(trainer: TrainerSettings, num_steps: int, grown: Sequence[AppliedCommand] = ()) -> RunCost:
    """The cost of a run whose network never changes: the host with these kernels from the first step."""
    ledger = CostLedger(trainer, host_cost(trainer))
    for command in grown:
        if command.kernel is not None:
            ledger.add_seed(command.seed, command.kernel)
    return ledger.total(num_steps)
