"""Connects a training loop with Kafka and S3, which it never waits for between its start and its end.

Importing the package loads nothing heavy: programs that do not train read its settings.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.connection.connector import connect
    from esper.connection.run_handle import RunHandle

__all__ = ["RunHandle", "connect"]

_MODULES = {"RunHandle": "run_handle", "connect": "connector"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"esper.connection.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
