"""AwakeSeed: a seed that holds a module, and how it takes part in its layer.

Owns the module, its breaker and alpha. Invariant: ``blend`` gives a tensor of the shape, type and
device of h; where the seed fails, that is h, bit for bit, in the same step.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper.kasmina.autograd import PULL, Guarded, Isolated, Pull, SeedCall, are_finite, is_finite, isolated_gradient
from esper.kasmina.breaker import Breaker
from esper.kasmina.hosts import Batching
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.watchdog import TimeLimit
from esper.schemas.enums import SeedStage

TIME_LIMIT_S = 30.0
"""A seed's forward or backward that takes longer is interrupted, and has failed."""


class Mode(IntEnum):
    """How a seed takes part: not at all, beside its host, or in its host's output."""

    IDLE = 0
    ISOLATED = 1
    BLENDED = 2


class Mark(NamedTuple):
    """What calls left on the device: the seed ran; an output of it was not finite."""

    has_run: bool = False
    was_faulty: bool = False


_MODES = {SeedStage.GERMINATED: Mode.IDLE, SeedStage.TRAINING: Mode.ISOLATED}


class AwakeSeed:
    """One seed with its module.

    Attributes:
        stage: set by ``follow``.
        gain: alpha, likewise; ``alpha_on_device`` is the same for compiled code.
        marks: (2,), a ``Mark`` set by calls whose outcome only the device knows.
        has_run: whether it was called since it woke, as far as ``settle`` has heard.
        is_suspended: the breaker is open, as compiled code sees it.
    """

    def __init__(self, kernel: LoadedKernel, module: nn.Module, device: torch.device, batching: Batching) -> None:
        self.kernel = kernel
        self.module = module
        self.stage = SeedStage.GERMINATED
        self.mode = Mode.IDLE
        self.gain = 0.0
        self.alpha_on_device = torch.zeros((), device=device)
        self.marks = torch.zeros(2, dtype=torch.bool, device=device)
        self.breaker = Breaker()
        self._num_samples = batching.num_samples
        self.time_limit_s = TIME_LIMIT_S
        self.has_run = False
        self.is_suspended = False
        self._scaler: Any = None
        self._traced_pull: Pull = PULL

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a model trains by itself: the scaler of this one is not its own
        return {**self.__dict__, "_scaler": None, "_traced_pull": PULL}

    @property
    def is_scaled(self) -> bool:
        """Whether a GradScaler scales the loss: it looks for its own overflows."""
        return self._scaler is not None

    @property
    def is_isolated(self) -> bool:
        """Whether it learns beside its host."""
        return self.mode is Mode.ISOLATED

    def isolated_gradient(self, g: Tensor, s: Tensor) -> Tensor:
        """See ``esper.kasmina.autograd.isolated_gradient``."""
        return isolated_gradient(g, s, self._num_samples(s), self.kernel.num_features, self.pull())

    def pull(self) -> Pull:
        """What holds the seed near zero while it is isolated: its gradients are scaled as the loss is."""
        if self._scaler is None:
            return PULL
        scaled: Tensor = self._scaler.scale(torch.full((), PULL, device=self.marks.device))
        return scaled

    def follow_scaler(self, scaler: Any) -> None:
        """Scale the pull as this GradScaler scales the loss; compiled code takes the scale of now."""
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._traced_pull = self.pull()

    def follow(self, stage: SeedStage, alpha: float) -> None:
        """Take part as this stage does, with this share. Waits for no device."""
        self.stage, self.mode = stage, _MODES.get(stage, Mode.BLENDED)
        if self.gain != alpha:
            self.gain = alpha
            self.alpha_on_device.fill_(alpha)

    def settle(self, mark: Mark) -> None:
        """Between two steps: take in what ``marks`` said, and let the breaker's time pass."""
        self.has_run |= mark.has_run
        if isinstance(self._traced_pull, Tensor):
            self._traced_pull.fill_(self.pull())
        if mark.was_faulty and not self.is_suspended:
            self.breaker.failed("an output is not finite", is_grave=True)
        elif mark.has_run and not mark.was_faulty:
            self.breaker.succeeded()
        self.is_suspended = not self.breaker.lets_through()

    def to_device(self, device: torch.device) -> None:
        """Follow the module to where it was moved."""
        self.alpha_on_device, self.marks = self.alpha_on_device.to(device), self.marks.to(device)

    def blend(self, h: Tensor, *, is_traced: bool) -> Tensor:
        """The layer's output with this seed in it, by its stage; h itself where the seed fails."""
        if self.mode is Mode.IDLE:
            return h
        is_learning = torch.is_grad_enabled()
        if self.mode is Mode.ISOLATED and not is_learning:
            return h
        if is_traced:
            return self._traced(h)
        if is_learning:
            called: Tensor = SeedCall.apply(self, h, *self.module.parameters())
            return called
        tried = self.attempt(h)
        if tried is None:
            return h
        s, ok = tried
        blended = torch.add(h, s, alpha=self.gain)
        return blended if ok is None else torch.where(ok, blended, h)

    def attempt(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Run the module: s, and on an accelerator whether s is finite; None where it failed or may not run."""
        self.has_run = True
        if not self.breaker.lets_through():
            return None
        try:
            with _own_saved_tensors(), TimeLimit(self.time_limit_s):  # what interrupts stays in the inner one
                s = self._fitted(self.module(x), x)
        except Exception as error:  # whatever a seed raises: its host's output is there
            self.breaker.failed(f"{type(error).__name__}: {error}")
            return None
        if s.device.type != "cpu":
            ok = is_finite(s)
            self._mark(ok, x)
            return s, ok
        if not are_finite([s]):
            if are_finite([x]):  # else the host itself is sick: not the seed's doing
                self.breaker.failed("an output is not finite", is_grave=True)
            return None
        if not torch.is_grad_enabled():
            self.breaker.succeeded()  # where gradients are wanted, the backward pass has the last word
        return s, None

    def _traced(self, h: Tensor) -> Tensor:
        if self.is_suspended:
            return h
        x = h.detach() if self.mode is Mode.ISOLATED else Guarded.apply(h)
        guarded = {name: Guarded.apply(p) for name, p in self.module.named_parameters()}
        s = self._fitted(functional_call(self.module, guarded, (x,)), h)
        ok = is_finite(s)
        self._mark(ok, h)
        if self.mode is Mode.ISOLATED:
            isolated: Tensor = Isolated.apply(
                h, s, ok, self._num_samples(h), self.kernel.num_features, self._traced_pull
            )
            return isolated
        return torch.where(ok, h + self.alpha_on_device.to(h.dtype) * s, h)

    def _mark(self, ok: Tensor, h: Tensor) -> None:
        was_faulty = ~ok & is_finite(h)  # a host that is sick itself makes every seed sick
        self.marks.logical_or_(torch.stack((torch.ones_like(ok), was_faulty)))

    def _fitted(self, s: Any, h: Tensor) -> Tensor:
        if not isinstance(s, Tensor) or s.shape != h.shape or s.device != h.device or not s.is_floating_point():
            raise ValueError(f"gives {_told(s)} for {_told(h)}")
        return s.to(h.dtype)  # under autocast a normalisation gives float32 beside a half-precision host


class _Same:
    """Saved-tensor hooks that change nothing."""

    def __call__(self, value: Any) -> Any:
        return value


def _own_saved_tensors() -> Any:
    """Keeps a seed's saved tensors out of an activation checkpoint around its host, which counts its own."""
    same = _Same()
    return torch.autograd.graph.saved_tensors_hooks(same, same)


def _told(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)} on {value.device}"
