"""Where a process serves its metrics."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """``port`` 0 takes a free one. ``setting`` is the variable that changes the port: errors name it."""

    host: str
    port: int
    setting: str
