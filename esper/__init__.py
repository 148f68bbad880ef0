"""Esper: neural networks that grow while they train, event-sourced on Kafka.

model = esper.wrap(net, target_layers=[nn.Conv2d, nn.Linear])
with esper.connect(model, optimizer) as run:
    ...                      # the training loop; run.step() after each optimizer step
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.connection import connect
    from esper.kasmina.baking import bake, unwrap
    from esper.wrapper import wrap

__all__ = ["bake", "connect", "unwrap", "wrap"]

_MODULES = {"bake": "kasmina.baking", "connect": "connection", "unwrap": "kasmina.baking", "wrap": "wrapper"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"esper.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
