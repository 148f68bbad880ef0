"""wrap(): puts seeds into a model's layers."""

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
    """Give each target layer its seeds, all dormant: the model computes what it computed, to the bit.

    Nothing is attached to the model, and no weight is read unless it is run on ``example_inputs``: a
    model on the meta device will do.
    ``unwrap`` gives it back.

    Args:
        model: any module; it is used, not copied. One that torch.compile made keeps its keys in
            state_dict, and its layers go by their plain names.
        target_layers: classes, patterns of names, predicates, or several of these
            (esper.kasmina.targets says what each means).
        seeds_per_layer: at most one seed per output feature.
        cache_size_mb: MiB of kernels kept in memory; 0 keeps none.
        example_inputs: one forward's arguments (a tensor, a tuple, or a mapping of keywords), for a
            model that torch.fx cannot trace: it is run on them once, here, and Tamiyo sees how data
            flowed. Without them the layers of what cannot be traced count as a chain.

    Raises:
        ContractError: the model is wrapped, scripted or sharded already, is inside
            DataParallel, or has no layer that was asked for and can hold seeds; it does not run
            on ``example_inputs``.
        TypeError: a target class cannot hold seeds.
    """
    for name, number, least in (("seeds_per_layer", seeds_per_layer, 1), ("cache_size_mb", cache_size_mb, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ContractError(f"{name} is a whole number of at least {least}, not {number!r}")
    _refuse_what_is_not_plain(model)
    found = find_targets(model, target_layers)
    morphable = MorphableModel(model, found.layers, seeds_per_layer)
    morphable.skipped = found.skipped
    morphable.kernel_cache = KernelCache(cache_size_mb * MIB)
    if example_inputs is not None:
        morphable.topology = morphable.find_topology(example_inputs)
    return morphable


def _refuse_what_is_not_plain(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ContractError("a scripted model runs its own copy of the code: wrap the model it was made from")
    if isinstance(model, _PARALLEL):
        raise ContractError(f"wrap the model first, then put it into {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, MorphableModel) or plain_class(module) is not type(module):
            raise ContractError("this model is wrapped already; use the MorphableModel that wrap() gave")
        if _SHARDED & {cls.__name__ for cls in type(module).__mro__}:
            raise ContractError("a sharded model cannot grow: its parameters are no longer those of its layers")
