"""Ways in which the module of a seed can fail, chosen one at a time or at random."""

import math
import random
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

Act = Callable[[Tensor], object]


class RaisesBackwards(torch.autograd.Function):
    """Identity whose backward pass raises."""

    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        raise ValueError("backwards")


def raises(_h: Tensor) -> Tensor:
    raise RuntimeError("broken")


def hangs(_h: Tensor) -> Tensor:
    while True:
        pass


FORWARD: dict[str, Act] = {
    "raises": raises,
    "gives NaN": lambda h: h * math.nan,
    "gives one infinity": lambda h: h.index_fill(0, torch.tensor([0]), math.inf),
    "gives another shape": lambda h: h[..., :1],
    "gives integers": lambda h: torch.ones_like(h, dtype=torch.int64),
    "gives nothing": lambda h: None,
    "hangs": hangs,
    "allocates too much": lambda h: torch.empty(1 << 55) + h,
}
"""Faults found in the forward pass: the output of the step is the host's."""

BACKWARD: dict[str, Act] = {
    "raises backwards": lambda h: RaisesBackwards.apply(h),
    "has no finite gradient": lambda h: torch.sqrt(h - h.detach()),  # 0 with an infinite gradient
}
"""Faults found in the backward pass: the gradient of the step is the host's."""

FAULTS = FORWARD | BACKWARD


class Faulty(nn.Module):
    """A module that calls ``act``. ``scale`` is its parameter."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act, self.num_calls = act, 0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor) -> object:
        self.num_calls += 1
        return self.act(h * self.scale)


class SometimesFaulty(nn.Module):
    """A healthy module that fails with probability ``rate``, in a random way each time.

    ``counts`` has the faults by name; ``num_given`` counts outputs without a fault in the forward pass.
    """

    def __init__(self, module: nn.Module, rng: random.Random, rate: float, counts: Counter[str]) -> None:
        super().__init__()
        self.module, self.rng, self.rate, self.counts = module, rng, rate, counts
        self.num_given = 0

    def forward(self, h: Tensor) -> object:
        s = self.module(h)
        fault = self.rng.choice(list(FAULTS)) if self.rng.random() < self.rate else None
        self.num_given += fault not in FORWARD
        if fault is None:
            return s
        self.counts[fault] += 1
        return FAULTS[fault](s)
