"""What a run costs: its host's size, and the FLOPs that training spent.

FLOPs count two for each multiply-add (``torch.utils.flop_counter``; kernels by the catalogue, which counts alike).
A training step on N images counts 3 N times a forward pass: the backward pass takes about two more (Kaplan et al.,
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
from esper.services.tolaria.counterfactuals.branch_trainer import Applied, SeedKey
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.training_loop import TARGETS, load_images, make_network

PASSES_IN_STEP = 3


@dataclass(frozen=True, slots=True)
class HostCost:
    """A host without any seed.

    Attributes:
        flops: of one forward pass over one image.
        outputs: of each layer that can hold seeds, the numbers that it gives for one image.
    """

    num_parameters: int
    flops: int
    outputs: Mapping[str, int]

    def flops_of(self, layer_id: str, kernel: LoadedKernel) -> int:
        """What a kernel adds to a forward pass over one image."""
        positions = self.outputs[layer_id] // kernel.num_features
        return cost_of(kernel.spec, kernel.kind, kernel.num_features).flops(positions)


def host_cost(trainer: TrainerSettings) -> HostCost:
    """Measure the host that the settings describe, with one pass over one image; chance is left as it was."""
    data = load_images(trainer)
    with torch.random.fork_rng(devices=[]):
        net = make_network(trainer, data.image_shape).eval()
    outputs: dict[str, int] = {}

    def see(name: str, output: torch.Tensor) -> None:
        outputs[name] = output.numel()

    def watch(name: str, layer: nn.Module) -> Any:
        return layer.register_forward_hook(lambda _module, _args, output: see(name, output))

    hooks = [watch(name, layer) for name, layer in net.named_modules() if isinstance(layer, TARGETS)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(data.val_x[:1])
    for hook in hooks:
        hook.remove()
    return HostCost(sum(p.numel() for p in net.parameters()), counter.get_total_flops(), outputs)


@dataclass(frozen=True, slots=True)
class RunCost:
    """What a run came to. ``grown``: what stands in it at its end, as germinations that would put it there."""

    num_parameters_host: int
    num_parameters: int
    training_flops: float
    grown: tuple[Applied, ...] = ()


@dataclass(eq=False, slots=True)
class Ledger:
    """Counts what a run costs, boundary by boundary; an observer of the run.

    A seed costs its kernel's FLOPs from its first training step until it is given up.
    """

    trainer: TrainerSettings
    host: HostCost
    _kernels: dict[SeedKey, LoadedKernel] = field(default_factory=dict)
    _awake: dict[SeedKey, int] = field(default_factory=dict)
    _flops: float = 0.0
    _num_steps: int = 0

    def before_commands(self, commands: Sequence[ReceivedCommand], step: int) -> None:
        """Nothing is counted yet."""

    def applied(self, command: ReceivedCommand, moved: Cause, step: int) -> None:
        """What it moved is told when the boundary is passed."""

    def boundary_passed(self, moves: Sequence[Move]) -> None:
        """The steps since the last boundary were done with the seeds that were awake then."""
        self._count(self.trainer.link.boundary_steps)
        for move in moves:
            plan, seed = move.plan, (move.plan.layer_id, move.plan.seed_id)
            if move.kernel is not None:
                self._kernels[seed] = move.kernel
            if plan.to_stage is SeedStage.TRAINING:
                self.wake(seed, self._kernels[seed])
            elif plan.to_stage in EMBARGO_STAGES:
                self._awake.pop(seed, None)

    def wake(self, seed: SeedKey, kernel: LoadedKernel) -> None:
        """From here on this seed is part of every step."""
        self._kernels[seed] = kernel
        self._awake[seed] = self.host.flops_of(seed[0], kernel)

    def total(self, num_steps: int) -> RunCost:
        """What it came to after so many steps; the last ones had no boundary."""
        self._count(num_steps - self._num_steps)
        kernels = {seed: self._kernels[seed] for seed in sorted(self._awake)}
        added = sum(cost_of(k.spec, k.kind, k.num_features).num_parameters for k in kernels.values())
        grown = tuple(Applied(0, Action.GERMINATE, *seed, kernel) for seed, kernel in kernels.items())
        return RunCost(self.host.num_parameters, self.host.num_parameters + added, self._flops, grown)

    def _count(self, num_steps: int) -> None:
        forward = self.host.flops + sum(self._awake.values())
        self._flops += PASSES_IN_STEP * self.trainer.batch_size * num_steps * forward
        self._num_steps += num_steps


def cost_of_steps(trainer: TrainerSettings, num_steps: int, grown: Sequence[Applied] = ()) -> RunCost:
    """What a run costs whose network never changes: the host, with some kernels from the beginning."""
    ledger = Ledger(trainer, host_cost(trainer))
    for one in grown:
        if one.kernel is not None:
            ledger.wake(one.seed, one.kernel)
    return ledger.total(num_steps)
