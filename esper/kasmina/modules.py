"""The modules of the catalogue: each takes a layer's output h and gives what is added to it, s(h).

Invariant: fresh, s(h) is exactly 0 for every h whose sums over features stay finite, so that a seed leaves
its layer as it was. No randomness and no buffer in a forward pass: the same h gives the same s(h).

F: features. Linear: h is (..., F). Conv1d: (N, F, L) or (F, L). Conv2d: (N, F, H, W) or (F, H, W).
s(h) has the shape of h.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.kasmina.catalogue import KERNEL_SIZE, Options, cost_of, squeezed, widened
from esper.kasmina.hosts import CHANNEL_DIM
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind

_CONVOLUTIONS: Mapping[LayerKind, type[nn.Conv1d | nn.Conv2d]] = MappingProxyType(
    {LayerKind.CONV1D: nn.Conv1d, LayerKind.CONV2D: nn.Conv2d}
)


class Noop(nn.Module):
    """s(h) = 0: the placebo."""

    def forward(self, h: Tensor) -> Tensor:
        """Zeros, of the shape of ``h``."""
        return torch.zeros_like(h)


class Affine(nn.Module):
    """s(h) = w * h + b, feature by feature; w and b start at 0.

    Shapes: w, b: (F,) for linear layers, (F, 1) or (F, 1, 1) for convolutions.
    """

    def __init__(self, features: int, kind: LayerKind) -> None:
        super().__init__()
        shape = (features, *(1,) * (-CHANNEL_DIM[kind] - 1))
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        return h * self.weight + self.bias


class Norm(Affine):
    """s(h) = w * (h - mean) / std + b; w and b start at 0.

    Mean and standard deviation are those of the features at each position for linear layers (LayerNorm), and
    of a whole sample, features and positions, for convolutions (GroupNorm with one group). Nothing is remembered
    between batches.
    """

    def __init__(self, features: int, kind: LayerKind) -> None:
        super().__init__(features, kind)
        self._from_dim = CHANNEL_DIM[kind]

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        return super().forward(functional.layer_norm(h, h.shape[self._from_dim :]))


class SqueezeExcite(nn.Module):
    """s(h) = h * (sigmoid(U relu(V m(h) + c) + b) - 1/2): a gate per feature; U and b start at 0.

    m(h) is the mean of h over all positions of a sample for convolutions, and h itself for linear layers,
    whose positions may not know of each other. Written as tanh(z / 2) / 2, which is sigmoid(z) - 1/2 and
    exactly 0 at 0.

    Shapes: V: (S, F), U: (F, S), S the squeezed width.
    """

    def __init__(self, features: int, squeezed_features: int, kind: LayerKind) -> None:
        super().__init__()
        self.squeeze = nn.Linear(features, squeezed_features)
        self.excite = _zeroed(nn.Linear(squeezed_features, features))
        self._spatial_dims = tuple(range(CHANNEL_DIM[kind] + 1, 0))

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        means = h.mean(self._spatial_dims) if self._spatial_dims else h
        gate = 0.5 * torch.tanh(0.5 * self.excite(torch.relu(self.squeeze(means))))
        return h * gate[(..., *(None,) * len(self._spatial_dims))]


def _pointwise(kind: LayerKind, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    if kind is LayerKind.LINEAR:
        return nn.Linear(inputs, outputs, bias=bias)
    return _CONVOLUTIONS[kind](inputs, outputs, 1, bias=bias)


def _zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _low_rank(features: int, kind: LayerKind, options: Options) -> nn.Module:
    rank = int(options["rank"])
    up = _zeroed(_pointwise(kind, rank, features, bias=False))
    return nn.Sequential(_pointwise(kind, features, rank, bias=False), up)


def _two_layers(features: int, kind: LayerKind, hidden: int) -> nn.Module:
    up = _zeroed(_pointwise(kind, hidden, features, bias=True))
    return nn.Sequential(_pointwise(kind, features, hidden, bias=True), nn.GELU(), up)


def _depthwise(features: int, kind: LayerKind, _options: Options) -> nn.Module:
    conv = _CONVOLUTIONS[kind]
    return _zeroed(conv(features, features, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=features))


def _residual(features: int, kind: LayerKind, options: Options) -> nn.Module:
    conv, hidden = _CONVOLUTIONS[kind], widened(features, options)
    up = _zeroed(conv(hidden, features, KERNEL_SIZE, padding=KERNEL_SIZE // 2))
    return nn.Sequential(conv(features, hidden, KERNEL_SIZE, padding=KERNEL_SIZE // 2), nn.ReLU(), up)


Builder = Callable[[int, LayerKind, Options], nn.Module]

BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "noop": lambda _features, _kind, _options: Noop(),
        "affine": lambda features, kind, _options: Affine(features, kind),
        "norm": lambda features, kind, _options: Norm(features, kind),
        "low_rank": _low_rank,
        "bottleneck": lambda features, kind, options: _two_layers(features, kind, widened(features, options)),
        "mlp": lambda features, kind, options: _two_layers(features, kind, int(options["width"])),
        "squeeze_excite": lambda features, kind, options: SqueezeExcite(features, squeezed(features, options), kind),
        "depthwise": _depthwise,
        "residual": _residual,
    }
)
"""Name of the catalogue -> what builds it. Names of parameters never change: kernels hold them."""


def build_module(spec: BlueprintSpec, kind: LayerKind, num_features: int) -> nn.Module:
    """Build the module of a spec for one layer kind and width, on the current default device.

    Raises:
        KernelError: as ``cost_of``; nothing was built.
    """
    cost_of(spec, kind, num_features)
    return BUILDERS[spec.module](num_features, kind, spec.parameters)
