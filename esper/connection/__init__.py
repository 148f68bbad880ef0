"""The trainer's link: what connects a training loop with Oona, and never makes it wait."""

from esper.connection.run import RunLink, connect

__all__ = ["RunLink", "connect"]
