"""The trainer's link: what connects a training loop with Oona, and never makes it wait.

Importing the package loads nothing heavy: its settings are read by programs that train nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.connection.connector import connect
    from esper.connection.follower_link import FollowerLink
    from esper.connection.run_link import RunLink

__all__ = ["FollowerLink", "RunLink", "connect"]

_MODULES = {"FollowerLink": "follower_link", "RunLink": "run_link", "connect": "connector"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"esper.connection.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
