"""Growth beside a running optimizer: new parameters join, all other state stays as it is.

They are appended to the group of the layer that they grow in, and so follow its rule; no
group is added, so that schedulers, which hold one base rate a group, go on.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer


def join(optimizer: Optimizer, beside: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Add parameters to the group that holds those of ``beside`` (the first group where none does)."""
    mine = {id(p) for p in beside.parameters(recurse=False)}
    groups = optimizer.param_groups
    home = next((g for g in groups if any(id(p) in mine for p in g["params"])), groups[0])
    home["params"].extend(parameters)


def leave(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take parameters and their state out again."""
    gone = {id(p): p for p in parameters}
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
