"""wrap(): adds dormant seeds to a model's layers."""

from collections.abc import Sequence

import torch
from torch import nn

from esper.errors import ContractError
from esper.kasmina.cache import MIB, KernelCache
from esper.kasmina.flow import ExampleInputs
from esper.kasmina.layer import plain_class
from esper.kasmina.model import MorphableModel
from esper.kasmina.targets import Target, find_targets

_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule"})
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def wrap(
    model: nn.Module,
    target_layers: Target | Sequence[Target] = (nn.Linear,),
    seeds_per_layer: int = 4,
    cache_size_mb: int = 128,
    example_inputs: ExampleInputs | None = None,
) -> MorphableModel:
    """Add dormant seeds to the target layers of a model. Its output stays the same, bit for bit.

    The model is used, not copied, and no weight is read unless ``example_inputs`` are given, so it may be on the meta
    device. ``esper.unwrap`` returns the plain model.

    Args:
        model: any module. A compiled one (torch.compile) keeps the keys of its ``state_dict``, and its layers have
            their plain names.
        target_layers: module classes, name patterns, predicates, or a sequence of these; see
            ``esper.kasmina.targets``.
        seeds_per_layer: the most seeds in a layer; a layer has at most one for each output feature.
        cache_size_mb: memory for kernels in MiB; 0 keeps none.
        example_inputs: the arguments of one forward pass (a tensor, a tuple, or a mapping of keywords), for a model
            that torch.fx cannot trace. The model runs on them once, to find how data flows between its layers. Without
            them, the layers of an untraceable module count as a chain.

    Raises:
        ContractError: the model is wrapped, scripted, sharded or inside DataParallel; it has no target layer that can
            hold seeds; it does not run on ``example_inputs``; or a number is out of range.
        TypeError: a target class cannot hold seeds.
    """
    for name, number, least in (("seeds_per_layer", seeds_per_layer, 1), ("cache_size_mb", cache_size_mb, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ContractError(f"{name} must be an integer of at least {least}, not {number!r}")
    _verify_plain(model)
    found = find_targets(model, target_layers)
    morphable = MorphableModel(model, found.layers, seeds_per_layer)
    morphable.skipped = found.skipped
    morphable.kernel_cache = KernelCache(cache_size_mb * MIB)
    if example_inputs is not None:
        morphable.topology = morphable.find_topology(example_inputs)
    return morphable


def _verify_plain(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ContractError("a scripted model runs its own copy of the code: wrap the model it was made from")
    if isinstance(model, _PARALLEL):
        raise ContractError(f"wrap the model first, then put it into {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, MorphableModel) or plain_class(module) is not type(module):
            raise ContractError("the model is wrapped already: use the MorphableModel that wrap() returned")
        if _SHARDED & {cls.__name__ for cls in type(module).__mro__}:
            raise ContractError("a sharded model cannot grow, since its layers do not hold its parameters: use DDP")
