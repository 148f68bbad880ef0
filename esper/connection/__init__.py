"""Connects a training loop with Oona, without ever making it wait for the network.

Importing the package loads nothing heavy: programs that do not train read its settings.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.connection.connector import connect
    from esper.connection.follower_link import FollowerLink
    from esper.connection.run_handle import RunHandle
    from esper.connection.run_link import RunLink

__all__ = ["FollowerLink", "RunHandle", "RunLink", "connect"]

_MODULES = {
    "FollowerLink": "follower_link",
    "RunHandle": "run_handle",
    "RunLink": "run_link",
    "connect": "connector",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"esper.connection.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
