"""What the object store cost: a seam for whoever counts.

``BlobStore`` calls an ``Observer`` once for every operation, when it has ended. ``StorageStats`` is
the observer that adds up; another one may feed Prometheus.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["ok", "missing", "altered", "refused", "unavailable", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class StorageCall:
    """One operation of a ``BlobStore`` that has ended.

    ``seconds`` and ``num_retries`` hold all its requests; ``num_bytes`` counts blob bytes that went either way,
    those of attempts that broke off among them.
    """

    operation: str
    outcome: Outcome
    seconds: float
    num_retries: int
    num_bytes: int


Observer = Callable[[StorageCall], None]
"""Called in the event loop; must not block, and must not raise."""


def ignore(_call: StorageCall) -> None:
    """The observer of those who do not count."""


@dataclass(slots=True)
class StorageStats:
    """Adds up; give its ``add`` to a ``BlobStore``. Keys are (operation, outcome), or the operation alone."""

    calls: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, call: StorageCall) -> None:
        """Count one operation."""
        name = call.operation
        self.calls[name, call.outcome] += 1
        self.retries[name] += call.num_retries
        self.num_bytes[name] += call.num_bytes
        self.seconds[name] = self.seconds.get(name, 0.0) + call.seconds
