"""Which modules can hold seeds, and what a seed has to know of one: its kind and its width.

Owns the list of host types. A kind says where the feature dimension of the output h is:

    linear  h is (..., F)            conv1d  h is (..., F, L)            conv2d  h is (..., F, H, W)

nn.MultiheadAttention is a linear host: its parent reads the weights of its projections without
calling them, so its seeds sit at its own output, the first of the two that it returns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from esper.schemas.enums import LayerKind

CHANNEL_DIM: Mapping[LayerKind, int] = MappingProxyType(
    {LayerKind.LINEAR: -1, LayerKind.CONV1D: -2, LayerKind.CONV2D: -3}
)
"""The feature dimension of a host's output, counted from the end: unbatched inputs have it there too."""


@dataclass(frozen=True, slots=True)
class HostType:
    """One type of module that can hold seeds: its kind, and how to read the width of its output.

    ``has_features_last``: its weight is (in, F); else it is (F, ...).
    """

    kind: LayerKind
    num_features: Callable[[Any], int]
    has_features_last: bool = False


def _out_channels(module: Any) -> int:
    return int(module.out_channels)


_TYPES: dict[type[nn.Module] | str, HostType] = {
    nn.Linear: HostType(LayerKind.LINEAR, lambda m: int(m.out_features)),
    nn.Conv1d: HostType(LayerKind.CONV1D, _out_channels),
    nn.Conv2d: HostType(LayerKind.CONV2D, _out_channels),
    nn.ConvTranspose1d: HostType(LayerKind.CONV1D, _out_channels),
    nn.ConvTranspose2d: HostType(LayerKind.CONV2D, _out_channels),
    nn.MultiheadAttention: HostType(LayerKind.LINEAR, lambda m: int(m.embed_dim)),
    "transformers.pytorch_utils.Conv1D": HostType(LayerKind.LINEAR, lambda m: int(m.nf), has_features_last=True),
}


def host_type(module: nn.Module) -> HostType | None:
    """The type of host that a module is, by its class or a base of it; None where it cannot hold seeds."""
    for cls in type(module).__mro__:
        found = _TYPES.get(cls) or _TYPES.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    return None


def output_of(returned: Any) -> Tensor:
    """The tensor h in what a host's forward returned."""
    h: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return h


@dataclass(frozen=True, slots=True)
class Batching:
    """Where a host's output counts its samples: ``dim``, if it has more than ``sample_dims`` dimensions."""

    dim: int
    sample_dims: int

    def num_samples(self, h: Tensor) -> int:
        """How many samples an output holds, at least 1; one without a batch is one sample."""
        return max(1, h.shape[self.dim]) if h.dim() > self.sample_dims else 1


def batching_of(module: nn.Module, kind: LayerKind) -> Batching:
    """That of a host, of whatever its parent makes of the other dimensions."""
    dim = 0 if getattr(module, "batch_first", True) else 1
    return Batching(dim, 1 + dim if kind is LayerKind.LINEAR else -CHANNEL_DIM[kind])
