"""What can grow: the entries that blueprints name, their options, and what each costs.

Owns the names and the limits; ``esper.kasmina.modules`` builds what passes here. No torch: a spec is
judged by arithmetic alone, before anything is built or allocated.

F: features of the layer's output h, its channel dimension. Positions: places where h has F values: all
vectors of a linear layer, L or H * W of a convolution's sample.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esper.errors import KernelError
from esper.schemas.assets import BlueprintSpec
from esper.schemas.base import MAX_INT32
from esper.schemas.enums import LayerKind

MAX_PARAMETERS = 50_000_000
"""Of one seed: 200 MB in float32."""

MAX_WIDENING = 16
"""How many times the size of h a seed's widest intermediate tensor may be: what a forward pass needs in memory."""

KERNEL_SIZE = 3
"""Of convolutions that look beyond one position, in each direction."""

MAX_KERNEL_BYTES = 256 * 1024 * 1024
"""Of a kernel as it is shipped; the most parameters that a seed may have take 200 MB."""

BYTES_PER_PARAMETER = 4
"""Kernels are shipped in float32."""

_TAPS: Mapping[LayerKind, int] = MappingProxyType({LayerKind.CONV1D: KERNEL_SIZE, LayerKind.CONV2D: KERNEL_SIZE**2})

Options = Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a module costs, exactly.

    FLOPs are two for each multiply-add of a matrix product or convolution, as in
    ``torch.utils.flop_counter``; operations element by element are not counted.

    Attributes:
        flops_per_position, flops_per_sample: of one forward pass.
        hidden_features: values at each position of the widest intermediate tensor.
    """

    num_parameters: int = 0
    flops_per_position: int = 0
    flops_per_sample: int = 0
    hidden_features: int = 0

    def flops(self, positions: int) -> int:
        """Of one forward pass over one sample of so many positions."""
        return self.flops_per_sample + positions * self.flops_per_position


@dataclass(frozen=True, slots=True)
class Option:
    """A number that a spec gives a module: its range, and whether it must be whole."""

    least: float
    greatest: float
    is_whole: bool = True

    def refusal(self, value: float) -> str | None:
        """What is wrong with a value; None where nothing is."""
        if not self.least <= value <= self.greatest or (self.is_whole and value != math.floor(value)):
            return f"must be {'a whole number ' if self.is_whole else ''}in {self.least:g}..{self.greatest:g}"
        return None


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A module that blueprints can name.

    Attributes:
        equation: s(h), what it adds to h, for people.
        cost: (F, kind, options) -> its cost.
        starts_at_zero: the parameters whose being zero makes s(h) = 0, whatever the others are.
    """

    equation: str
    targets: tuple[LayerKind, ...]
    options: Mapping[str, Option]
    cost: Callable[[int, LayerKind, Options], Cost]
    starts_at_zero: tuple[str, ...]


def widened(features: int, options: Options) -> int:
    """The hidden width that an ``expansion`` asks for."""
    return max(1, round(features * options["expansion"]))


def squeezed(features: int, options: Options) -> int:
    """The hidden width that a ``reduction`` asks for."""
    return max(1, round(features / options["reduction"]))


def _two_maps(features: int, hidden: int, *, taps: int = 1, has_bias: bool = True) -> Cost:
    """F -> hidden -> F, each output a sum over ``taps`` positions."""
    biases = hidden + features if has_bias else 0
    products = 2 * taps * features * hidden
    return Cost(products + biases, 2 * products, hidden_features=hidden)


def _depthwise_cost(features: int, kind: LayerKind, _options: Options) -> Cost:
    products = _TAPS[kind] * features
    return Cost(products + features, 2 * products, hidden_features=features)


def _gate_cost(features: int, kind: LayerKind, options: Options) -> Cost:
    gate = _two_maps(features, squeezed(features, options))
    if kind is LayerKind.LINEAR:
        return Cost(gate.num_parameters, gate.flops_per_position, hidden_features=features)
    return Cost(gate.num_parameters, flops_per_sample=gate.flops_per_position, hidden_features=features)


def _per_feature_cost(features: int, _kind: LayerKind, _options: Options) -> Cost:
    return Cost(2 * features, hidden_features=features)


_ALL = tuple(LayerKind)
_CONV = (LayerKind.CONV1D, LayerKind.CONV2D)
_EXPANSION = Option(0.01, 16.0, is_whole=False)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(
    {
        "noop": CatalogueEntry("0", _ALL, {}, lambda _f, _k, _o: Cost(), ()),
        "affine": CatalogueEntry("w * h + b", _ALL, {}, _per_feature_cost, ("weight", "bias")),
        "norm": CatalogueEntry("w * (h - mean) / std + b", _ALL, {}, _per_feature_cost, ("weight", "bias")),
        "low_rank": CatalogueEntry(
            "U V h",
            _ALL,
            {"rank": Option(1, 1024)},
            lambda f, _k, o: _two_maps(f, int(o["rank"]), has_bias=False),
            ("1.weight",),
        ),
        "bottleneck": CatalogueEntry(
            "U gelu(V h + c) + b",
            _ALL,
            {"expansion": _EXPANSION},
            lambda f, _k, o: _two_maps(f, widened(f, o)),
            ("2.weight", "2.bias"),
        ),
        "mlp": CatalogueEntry(
            "U gelu(V h + c) + b",
            _ALL,
            {"width": Option(1, 4096)},
            lambda f, _k, o: _two_maps(f, int(o["width"])),
            ("2.weight", "2.bias"),
        ),
        "squeeze_excite": CatalogueEntry(
            "h * (sigmoid(U relu(V mean(h) + c) + b) - 1/2)",
            _ALL,
            {"reduction": Option(1, 64)},
            _gate_cost,
            ("excite.weight", "excite.bias"),
        ),
        "depthwise": CatalogueEntry("w conv h + b, channel by channel", _CONV, {}, _depthwise_cost, ("weight", "bias")),
        "residual": CatalogueEntry(
            "U conv relu(V conv h + c) + b",
            _CONV,
            {"expansion": Option(0.01, 4.0, is_whole=False)},
            lambda f, k, o: _two_maps(f, widened(f, o), taps=_TAPS[k]),
            ("2.weight", "2.bias"),
        ),
    }
)
"""Name -> entry. What a name builds never changes: kernels in the log name it for ever."""


def cost_of(spec: BlueprintSpec, kind: LayerKind, num_features: int) -> Cost:
    """What the module of a spec costs in a layer of this kind and width: the proof that it may be built.

    Raises:
        KernelError: the catalogue does not have it, an option is missing or out of range, it does not fit
            the layer, or it is too large.
    """
    entry = CATALOGUE.get(spec.module)
    if entry is None:
        raise KernelError(f"no module {spec.module!r} in the catalogue: name one of {', '.join(CATALOGUE)}")
    if kind not in entry.targets or kind not in spec.targets:
        raise KernelError(
            f"{spec.module} does not go into a {kind} layer: choose a blueprint that names it as a target"
        )
    if not 1 <= num_features <= MAX_INT32:
        raise KernelError(f"{spec.module}: a layer cannot have {num_features} features")
    if set(spec.parameters) != set(entry.options):
        raise KernelError(
            f"{spec.module} takes {sorted(entry.options)}, not {sorted(spec.parameters)}: name just those"
        )
    for name, option in entry.options.items():
        refusal = option.refusal(spec.parameters[name])
        if refusal is not None:
            raise KernelError(f"{spec.module}: {name} {refusal}, not {spec.parameters[name]!r:.40}")
    cost = entry.cost(num_features, kind, spec.parameters)
    if cost.num_parameters > MAX_PARAMETERS:
        raise KernelError(
            f"{spec.module} would have {cost.num_parameters} parameters in a layer of {num_features} features, more "
            f"than {MAX_PARAMETERS}: choose a smaller blueprint"
        )
    if cost.hidden_features > MAX_WIDENING * num_features:
        raise KernelError(
            f"{spec.module} would make {cost.hidden_features} values of {num_features} at each position, more than "
            f"{MAX_WIDENING} times as many: choose a narrower blueprint"
        )
    return cost
