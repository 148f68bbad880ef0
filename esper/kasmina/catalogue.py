"""What can grow: modules that take a layer's output h and give what is added to it, s(h).

Every one starts with s(h) = 0, so that a fresh seed leaves its layer as it was. They are
built from a declarative spec; nothing that is fetched is ever executed.

F: features (the channel dimension). Linear: h is (..., F). Conv2d: h is (N, F, H, W).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from esper.errors import KernelError
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind

MAX_PARAMETERS = 50_000_000  # of one seed; beyond it a kernel is refused before anything is built


class Noop(nn.Module):
    """Adds nothing: the placebo."""

    def forward(self, h: Tensor) -> Tensor:
        """Zeros, of the shape of ``h``."""
        return torch.zeros_like(h)


class Affine(nn.Module):
    """s(h) = h * w + b, feature by feature; w and b start at 0."""

    def __init__(self, features: int, is_conv: bool) -> None:
        super().__init__()
        shape = (features, 1, 1) if is_conv else (features,)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        return h * self.weight + self.bias


def _pointwise(is_conv: bool, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, bias=bias) if is_conv else nn.Linear(inputs, outputs, bias=bias)


def _zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _noop(features: int, kind: LayerKind, _options: Mapping[str, float]) -> nn.Module:
    return Noop()


def _affine(features: int, kind: LayerKind, _options: Mapping[str, float]) -> nn.Module:
    return Affine(features, kind is LayerKind.CONV2D)


def _low_rank(features: int, kind: LayerKind, options: Mapping[str, float]) -> nn.Module:
    rank, is_conv = int(options["rank"]), kind is LayerKind.CONV2D
    up = _zeroed(_pointwise(is_conv, rank, features, bias=False))
    return nn.Sequential(_pointwise(is_conv, features, rank, bias=False), up)


def _bottleneck(features: int, kind: LayerKind, options: Mapping[str, float]) -> nn.Module:
    width, is_conv = max(1, round(features * options["expansion"])), kind is LayerKind.CONV2D
    up = _zeroed(_pointwise(is_conv, width, features, bias=True))
    return nn.Sequential(_pointwise(is_conv, features, width, bias=True), nn.GELU(), up)


def _depthwise(features: int, kind: LayerKind, _options: Mapping[str, float]) -> nn.Module:
    return _zeroed(nn.Conv2d(features, features, 3, padding=1, groups=features))


def _residual(features: int, kind: LayerKind, options: Mapping[str, float]) -> nn.Module:
    width = max(1, round(features * options["expansion"]))
    up = _zeroed(nn.Conv2d(width, features, 3, padding=1))
    return nn.Sequential(nn.Conv2d(features, width, 3, padding=1), nn.ReLU(), up)


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A module that blueprints can name: ``options`` has each parameter's least and greatest value."""

    build: Callable[[int, LayerKind, Mapping[str, float]], nn.Module]
    options: Mapping[str, tuple[float, float]]
    targets: tuple[LayerKind, ...]


_BOTH = (LayerKind.LINEAR, LayerKind.CONV2D)
_CONV = (LayerKind.CONV2D,)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(
    {
        "noop": CatalogueEntry(_noop, {}, tuple(LayerKind)),
        "affine": CatalogueEntry(_affine, {}, _BOTH),
        "low_rank": CatalogueEntry(_low_rank, {"rank": (1, 1024)}, _BOTH),
        "bottleneck": CatalogueEntry(_bottleneck, {"expansion": (0.01, 16.0)}, _BOTH),
        "depthwise": CatalogueEntry(_depthwise, {}, _CONV),
        "residual": CatalogueEntry(_residual, {"expansion": (0.01, 4.0)}, _CONV),
    }
)


def build_module(spec: BlueprintSpec, kind: LayerKind, num_features: int) -> nn.Module:
    """Build the module of a spec for one layer kind and width, on the current default device.

    Raises:
        KernelError: the catalogue does not have it, an option is missing or out of range, it
            does not fit the layer, or it is too large.
    """
    entry = CATALOGUE.get(spec.module)
    if entry is None:
        raise KernelError(f"no module {spec.module!r} in the catalogue ({', '.join(CATALOGUE)})")
    if kind not in entry.targets or kind not in spec.targets:
        raise KernelError(f"{spec.module} does not go into a {kind} layer")
    if set(spec.parameters) != set(entry.options):
        raise KernelError(f"{spec.module} takes {sorted(entry.options)}, not {sorted(spec.parameters)}")
    for name, (least, greatest) in entry.options.items():
        if not least <= spec.parameters[name] <= greatest:
            raise KernelError(f"{spec.module}: {name} must be in {least}..{greatest}")
    with torch.device("meta"):
        count = num_parameters(entry.build(num_features, kind, spec.parameters))
    if count > MAX_PARAMETERS:
        raise KernelError(f"{spec.module} would have {count} parameters, more than {MAX_PARAMETERS}")
    return entry.build(num_features, kind, spec.parameters)


def num_parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())
