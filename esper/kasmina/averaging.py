"""GradientAverager: gradients of grown seeds, averaged over the ranks of a DistributedDataParallel model.

DDP lists its parameters once, when it is made; what grows later it does not see. Here the first
gradient of a backward pass queues one callback behind that pass, as DDP itself does, and the
callback averages the gradients of all seeds that take part, in one flat buffer. So they are right
when ``backward`` returns: for clipping, for a GradScaler, for whatever reads ``.grad``.

Invariant: every rank joins each reduction, in the same order and with the same sizes, whatever
its seeds did. A seed that failed here, or was not called, counts as zeros. While nothing has
grown there is no hook anywhere.

Averaging twice is harmless: what was averaged is equal on all ranks, so accumulated gradients and
several backward passes come out as DDP's own do. Under ``no_sync`` nothing is sent.
Not for checkpoints with ``use_reentrant=True``, nor for DDP's ``join`` with uneven inputs.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from esper.errors import NotSupportedError
from esper.kasmina.model import MorphableModel
from esper.kasmina.seeds import Mode


class GradientAverager:
    """Hooks on the parameters of one model, for as long as something is awake in it."""

    def __init__(self, replica: DistributedDataParallel, model: MorphableModel) -> None:
        self._replica = replica
        self._model = model
        self._hooks: list[RemovableHandle] = []
        self._passes: set[int] = set()  # backward passes that have their callback

    def follow_growth(self) -> None:
        """Hook what the model has now. To be called whenever a seed woke or went to sleep."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if any(layer.awake for layer in self._model.layers.values()):
            seeds = (p for _name, p in self._model.named_seed_parameters())
            learning: list[Any] = [p for p in (*self._model.host.parameters(), *seeds) if p.requires_grad]
            self._hooks = [p.register_post_accumulate_grad_hook(self._queue) for p in learning]

    def _queue(self, _parameter: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if current in self._passes or not self._replica.require_backward_grad_sync:
            return
        self._passes.add(current)
        Variable._execution_engine.queue_callback(partial(self._average, current))

    @torch.no_grad()
    def _average(self, finished: int) -> None:
        self._passes.discard(finished)
        if self._replica._join_config.enable:
            raise NotSupportedError("seeds do not grow under DDP's join(): give every rank as many batches")
        for parameters in _alike(self._taking_part()):
            flat = torch.cat([_gradient(p).reshape(-1) for p in parameters])
            flat.div_(dist.get_world_size(self._replica.process_group))
            dist.all_reduce(flat, group=self._replica.process_group)
            for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
                if parameter.grad is None:
                    parameter.grad = part.view_as(parameter).clone()
                else:
                    parameter.grad.copy_(part.view_as(parameter))

    def _taking_part(self) -> Iterator[nn.Parameter]:
        """By layer and seed: the order does not depend on what a rank has lived through."""
        for layer in self._model.layers.values():
            for seed in layer.awake.values():
                if seed.mode is not Mode.IDLE:
                    yield from (p for p in seed.module.parameters() if p.requires_grad)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _alike(parameters: Iterator[nn.Parameter]) -> Sequence[list[nn.Parameter]]:
    """The parameters by device and type, since one buffer holds one kind."""
    kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(kinds.values())
