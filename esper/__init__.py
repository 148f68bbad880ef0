"""Esper: neural networks that grow while they train, run as an event-sourced system on Kafka.

model = esper.wrap(net, target_layers=[nn.Conv2d, nn.Linear])
with esper.connect(model, optimizer) as run:
    ...                      # your loop; run.step() after each optimizer step
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.connection import connect
    from esper.kasmina.baking import bake, unwrap
    from esper.wrapper import wrap

__all__ = ["bake", "connect", "unwrap", "wrap"]


def __getattr__(name: str) -> Any:
    if name == "wrap":
        from esper.wrapper import wrap

        return wrap
    if name in ("bake", "unwrap"):
        from esper.kasmina import baking

        return getattr(baking, name)
    if name == "connect":
        from esper.connection import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
