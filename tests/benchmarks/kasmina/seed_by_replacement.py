"""Seeds by the other method, for comparison alone: a wrapping module takes the layer's place in its parent.

It does what can be done for such a module: attributes that it lacks are its host's, so that
``.weight`` and ``.in_features`` are found. What Esper does instead is in esper/kasmina/layer.py.
"""

from typing import Any

from torch import nn

from esper.kasmina.targets import Target, find_targets


class Wrapping(nn.Module):
    """A layer in a box; dormant, it passes on what the layer gives."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.seeds: tuple[nn.Module, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output, with the seeds where there are any."""
        h = self.host(*args, **kwargs)
        for seed in self.seeds:
            h = h + seed(h)
        return h

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)


def wrap_by_replacement(model: nn.Module, target_layers: Target) -> nn.Module:
    """The model with every layer that wrap() would find in a box of its own."""
    boxes = {id(m): Wrapping(m) for m in find_targets(model, target_layers).layers.values()}
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if id(child) in boxes and not isinstance(parent, Wrapping):
                parent._modules[attribute] = boxes[id(child)]
    return boxes.get(id(model), model)
