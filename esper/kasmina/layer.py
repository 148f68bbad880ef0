"""KasminaLayer: the handle beside one module of the model, and the seeds that are awake in it.

A dormant layer is the module itself, nothing in its path. Waking swaps the module's class for
a subclass of it that blends the seeds in; going back to sleep swaps it back. So isinstance,
``.weight`` and state_dict stay the plain module's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.kernels import LoadedKernel
from esper.schemas.enums import LayerKind, SeedStage

FAILURES_TO_OPEN = 3
"""After so many failures of a seed its host's output is used until it is given up."""

PULL = 1.0
"""How strongly an isolated seed is held near zero; 1 lets it take one gradient step in activations."""

_HANDLE = "_kasmina_layer"
_awake_classes: dict[type[nn.Module], type[nn.Module]] = {}


class Isolated(torch.autograd.Function):
    """h unchanged to the bit. Its gradient g goes to h as it is, and to s as g + PULL * s / N.

    So a seed in TRAINING learns as if it were added, and its host never notices. The pull is the
    gradient of PULL * |s|^2 / 2N: nothing that s does comes back through the loss while it is
    isolated, and without the pull it would grow without bound (docs/decisions/0004).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor) -> Tensor:
        """h and s of one shape, (N, ...)."""
        ctx.save_for_backward(s)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient for h, and for s."""
        (s,) = ctx.saved_tensors
        return gradients[0], gradients[0] + PULL / s.shape[0] * s


class AwakeSeed:
    """A seed that holds a module. ``failures`` is a counter on the device: no sync in the step."""

    def __init__(self, kernel: LoadedKernel, module: nn.Module, device: torch.device) -> None:
        self.kernel = kernel
        self.module = module
        self.stage = SeedStage.GERMINATED
        self.alpha = 0.0
        self.errors = 0
        self._non_finite = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def num_failures(self) -> int:
        """Failures so far; waits for the device."""
        return self.errors + int(self._non_finite)

    def blend(self, h: Tensor) -> Tensor:
        """The layer's output with this seed in it, by its stage; ``h`` itself where the seed fails."""
        if self.stage is SeedStage.GERMINATED or self.errors >= FAILURES_TO_OPEN:
            return h
        is_isolated = self.stage is SeedStage.TRAINING
        try:
            s = self._finite(self.module(h.detach() if is_isolated else h))
            if s.shape != h.shape:
                raise RuntimeError(f"shape {tuple(s.shape)} for {tuple(h.shape)}")
        except RuntimeError:
            self.errors += 1
            return h
        if is_isolated:
            return Isolated.apply(h, s)  # type: ignore[no-any-return]
        return h + s if self.alpha == 1.0 else h + self.alpha * s

    def _finite(self, s: Tensor) -> Tensor:
        is_finite = torch.isfinite(s.detach()).all()
        self._non_finite += ~is_finite
        return torch.where(is_finite, s, torch.zeros_like(s))


class KasminaLayer:
    """One layer's handle: ``index`` is its row in the arrays of state."""

    def __init__(self, layer_id: str, index: int, module: nn.Module, seeds_per_layer: int) -> None:
        self.layer_id = layer_id
        self.index = index
        self.module = module
        self.kind = kind_of(module)
        self.num_features = int(module.weight.shape[0])  # type: ignore[index]
        self.num_seeds = min(seeds_per_layer, self.num_features)
        self.awake: dict[int, AwakeSeed] = {}

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.device

    def wake(self, seed_id: int, kernel: LoadedKernel) -> AwakeSeed:
        """Put a kernel into a seed; the layer's output stays as it is."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        module = kernel.build().to(device=weight.device, dtype=weight.dtype).train(self.module.training)
        seed = self.awake[seed_id] = AwakeSeed(kernel, module, weight.device)
        self.awake = dict(sorted(self.awake.items()))  # blended in seed order
        self._swap_class()
        return seed

    def sleep(self, seed_id: int) -> AwakeSeed:
        """Take a seed's module out; with the last one the layer is the plain module again."""
        seed = self.awake.pop(seed_id)
        self._swap_class()
        return seed

    def blend(self, h: Tensor) -> Tensor:
        """The layer's output with all its seeds, in their order."""
        for seed in self.awake.values():
            h = seed.blend(h)
        return h

    def _swap_class(self) -> None:
        plain = getattr(type(self.module), "_plain_class", type(self.module))
        if self.awake:
            self.module.__class__ = _awake_class(plain)
            object.__setattr__(self.module, _HANDLE, self)
        elif type(self.module) is not plain:
            self.module.__class__ = plain
            object.__delattr__(self.module, _HANDLE)


def kind_of(module: nn.Module) -> LayerKind:
    """The kind of a layer that can hold seeds.

    Raises:
        TypeError: it cannot.
    """
    if isinstance(module, nn.Conv2d):
        return LayerKind.CONV2D
    if isinstance(module, nn.Linear):
        return LayerKind.LINEAR
    raise TypeError(f"{type(module).__name__} cannot hold seeds: nn.Linear and nn.Conv2d can")


def _awake_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _awake_classes:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            handle: KasminaLayer = getattr(self, _HANDLE)
            return handle.blend(plain.forward(self, *args, **kwargs))

        _awake_classes[plain] = type(plain.__name__, (plain,), {"forward": forward, "_plain_class": plain})
    return _awake_classes[plain]
