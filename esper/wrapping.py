"""wrap(): puts seeds into a model's layers."""

from collections.abc import Sequence

from torch import nn

from esper.errors import ContractError
from esper.kasmina.cache import MIB, KernelCache
from esper.kasmina.hosts import host_type
from esper.kasmina.model import MorphableModel


def wrap(
    model: nn.Module,
    target_layers: Sequence[type[nn.Module]] = (nn.Linear,),
    seeds_per_layer: int = 4,
    cache_size_mb: int = 128,
) -> MorphableModel:
    """Give each target layer its seeds, all dormant: the model computes what it computed, to the bit.

    Args:
        model: any module; it is used, not copied.
        target_layers: classes of layers that hold seeds; nn.Linear and nn.Conv2d, or subclasses.
        seeds_per_layer: at most one seed per output feature.
        cache_size_mb: MiB of kernels kept in memory; 0 keeps none.

    Raises:
        ContractError: the model is wrapped already, or has no such layer.
        TypeError: a target class cannot hold seeds.
    """
    if any(isinstance(m, MorphableModel) for m in model.modules()):
        raise ContractError("this model is wrapped already; use the MorphableModel that wrap() gave")
    if seeds_per_layer < 1:
        raise ContractError("seeds_per_layer must be at least 1")
    targets = tuple(target_layers)
    found = {name or type(model).__name__: m for name, m in model.named_modules() if isinstance(m, targets)}
    if not found:
        named = ", ".join(t.__name__ for t in targets)
        raise ContractError(f"{type(model).__name__} has no layer of {named}: name others in target_layers")
    for module in found.values():
        if host_type(module) is None:
            raise TypeError(f"{type(module).__name__} cannot hold seeds: nn.Linear and nn.Conv2d can")
    morphable = MorphableModel(model, found, seeds_per_layer)
    morphable.kernel_cache = KernelCache(cache_size_mb * MIB)
    return morphable
