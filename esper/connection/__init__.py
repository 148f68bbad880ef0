"""The trainer's link: what connects a training loop with Oona, and never makes it wait.

Importing the package loads nothing heavy: its settings are read by programs that train nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.connection.run import RunLink, connect

__all__ = ["RunLink", "connect"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from esper.connection import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
