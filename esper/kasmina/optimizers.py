"""Growth beside a running optimizer: new parameters join, all other state stays as it is.

They are put into a group of the layer that they grow in, and so follow its rule; no group is
added, so that schedulers, which hold one base rate a group, go on. Matrices and filters go where
the layer's weight is, vectors where its bias is: a split by weight decay stays a split.
Invariant: what cannot grow is refused before anything has changed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Muon, Optimizer

from esper.errors import KernelError, NotSupportedError

MAX_WRAPPERS = 8  # around an optimizer; more than that is a circle

_REFUSED: Mapping[str, str] = {
    "LBFGS": "holds one flat view of all parameters, and the gradient of an isolated seed is not that of the loss",
    "SparseAdam": "takes sparse gradients only, and those of seeds are dense",
    "ZeroRedundancyOptimizer": "holds a share of the parameters on each rank, settled when it was made",
}


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The torch.optim optimizer itself, out of what wraps it (``.optimizer``, as Accelerate and Lightning do).

    Raises:
        NotSupportedError: there is none inside, or it cannot take new parameters.
    """
    found = optimizer
    for _n in range(MAX_WRAPPERS):
        inner = getattr(found, "optimizer", None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Optimizer):
        raise NotSupportedError(f"{type(optimizer).__name__} is no torch.optim optimizer and holds none")
    bases = {cls.__name__ for cls in type(found).__mro__}
    for name, reason in _REFUSED.items():
        if name in bases:
            raise NotSupportedError(f"nothing can grow beside {name}: it {reason}. Use SGD, AdamW or another")
    return found


def verify_can_join(optimizer: Optimizer, beside: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """See that parameters of these shapes could join.

    Raises:
        KernelError: the optimizer does not take one of them.
        NotSupportedError: it takes none at all.
    """
    plain = plain_optimizer(optimizer)
    if not isinstance(plain, Muon):
        return
    for name, weight in weights.items():
        if weight.dim() != 2:
            shape = tuple(weight.shape)
            raise KernelError(f"Muon takes matrices only, and {name} beside {type(beside).__name__} is {shape}")


def join(optimizer: Optimizer, beside: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Add named parameters to the group, or two, that hold those of ``beside``; those that are there stay.

    Where none does (the layer is frozen) they join the first group. The names are kept by an
    optimizer that was made from named parameters.

    Raises:
        KernelError, NotSupportedError: the optimizer cannot take them; nothing has changed.
    """
    plain = plain_optimizer(optimizer)
    there = {id(p) for group in plain.param_groups for p in group["params"]}
    joining = {name: p for name, p in named if id(p) not in there}
    verify_can_join(plain, beside, joining)
    for home, members in _homes(plain, beside, joining):
        _extend(plain, home, members)


def leave(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take parameters, their names and their state out again."""
    plain = plain_optimizer(optimizer)
    gone = {id(p): p for p in parameters}
    for group in plain.param_groups:
        kept = [n for n, p in enumerate(group["params"]) if id(p) not in gone]
        for field in ("params", "param_names"):
            if field in group:
                group[field][:] = [group[field][n] for n in kept]
    for parameter in gone.values():
        plain.state.pop(parameter, None)


def _homes(
    optimizer: Optimizer, beside: nn.Module, joining: Mapping[str, Tensor]
) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The groups to join and who joins which; at most one each for vectors and for all others."""
    places = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = sorted((p for p in beside.parameters() if id(p) in places), key=lambda p: -p.dim())
    of_matrices = places[id(own[0])] if own else optimizer.param_groups[0]
    of_vectors = next((places[id(p)] for p in own if p.dim() < 2), of_matrices)
    vectors = {n: p for n, p in joining.items() if p.dim() < 2}
    others = {n: p for n, p in joining.items() if p.dim() >= 2}
    return [(home, who) for home, who in ((of_matrices, others), (of_vectors, vectors)) if who]


def _extend(optimizer: Optimizer, home: dict[str, Any], members: Mapping[str, Tensor]) -> None:
    """Let the optimizer take them by its own rules, as a group; then fold that group into its home."""
    has_names = "param_names" in home
    rule = {key: value for key, value in home.items() if key not in ("params", "param_names")}
    optimizer.add_param_group({**rule, "params": list(members.items() if has_names else members.values())})
    joined = optimizer.param_groups.pop()
    home["params"].extend(joined["params"])
    if has_names:
        home["param_names"].extend(joined["param_names"])
    _begin_state(optimizer, rule, joined["params"])


def _begin_state(optimizer: Optimizer, rule: Mapping[str, Any], joined: list[Tensor]) -> None:
    """Make what torch.optim would not make at the next step for a parameter that comes late."""
    if isinstance(optimizer, Adagrad):  # makes its state when it is made
        fresh = Adagrad([{**rule, "params": joined}], initial_accumulator_value=rule["initial_accumulator_value"])
        for parameter in joined:
            optimizer.state[parameter] = fresh.state[parameter]
    elif isinstance(optimizer, SGD) and rule["fused"] and rule["momentum"]:
        for parameter in joined:  # the fused step takes buffers of all parameters or of none
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
