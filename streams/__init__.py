"""The stream processors: Faust agents that fold the log into Postgres, and what reads it back.

``faust -A esper.streams worker --without-web`` finds ``app`` here; it is made on first use,
so that importing this package opens nothing.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "app":
        from esper.streams.worker.app import make_app

        globals()["app"] = app = make_app()
        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
