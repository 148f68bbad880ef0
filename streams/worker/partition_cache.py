"""The cache of a partition: what its reader wrote, kept so that the next batch need not read it from Postgres.

Invariant: the cache is valid only while the stored position, in the live tables, is the one that it was left at. A
failed transaction, another worker's batch and a swapped-in rebuild all break this, and empty the cache.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

MAX_LAYERS = 3_000  # per partition; about 0.5 KB per seed
MAX_RUNS = 10_000

RunKey = tuple[str, int]
"""(run, incarnation)."""

LayerKey = tuple[str, int, int, str]
"""(run, incarnation, first step, layer): the primary key of health_windows without its last column, the seed."""


@dataclass(slots=True)
class Progress:
    """The progress of one incarnation: its highest sequence and, for telemetry, its highest step; -1 for none."""

    last_sequence: int = -1
    last_step: int = -1


@dataclass(slots=True)
class OpenWindow:
    """A health window that may still grow. ``sums``: signals, non-finite signals, one sum and one count per field."""

    sums: list[Any]
    logged_at: datetime
    log_partition: int
    first_offset: int
    is_stored: bool


@dataclass(slots=True)
class PartitionCache:
    """Valid at ``next_offset`` of the positions table ``table`` (its oid, which a rebuild changes)."""

    next_offset: int | None = None
    table: int | None = None
    progress: dict[RunKey, Progress] = field(default_factory=dict)
    layers: dict[LayerKey, dict[int, OpenWindow]] = field(default_factory=dict)
    """The windows of a layer by seed: a layer in here has all of its stored windows."""
    dead_letters: dict[str, tuple[int, bool]] | None = None
    """Event id -> (offset of its record, whether the event was projected since); None if not read yet."""

    def validate(self, next_offset: int, table: int) -> None:
        """Empty the cache unless it is valid at this position of this table."""
        if (self.next_offset, self.table) != (next_offset, table):
            self.clear()
            self.table = table

    def advance(self, next_offset: int) -> None:
        """Make the cache valid at the position that the transaction commits; evicts the oldest entries."""
        self.next_offset = next_offset
        if len(self.progress) > MAX_RUNS:
            self.progress.clear()
        if len(self.layers) > MAX_LAYERS:
            self._evict_oldest_windows()

    def clear(self) -> None:
        """Empty the cache: the next batch reads from Postgres."""
        self.next_offset = self.table = self.dead_letters = None
        self.progress.clear()
        self.layers.clear()

    def _evict_oldest_windows(self) -> None:
        keys = list(self.layers)  # in insertion order: the first were opened first
        for key in keys[: len(keys) - MAX_LAYERS // 2]:
            del self.layers[key]
