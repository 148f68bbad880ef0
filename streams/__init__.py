"""Stream processing: Faust agents that project the log into Postgres, and typed reads of the projections.

``faust -A esper.streams worker --without-web`` finds ``app`` here. It is created on first access, so that an import of
this package opens no connection.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "app":
        from esper.streams.worker.app import make_app

        globals()["app"] = app = make_app()
        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
