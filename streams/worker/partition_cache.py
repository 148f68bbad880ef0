"""What a reader remembers of a partition between two batches, so that it need not ask Postgres again.

Invariant: it counts only where the stored position, in the tables that are live now, is the one that it was left
at. A failed transaction, another worker's fold, a rebuild that was swapped in: each shows there, or in ``forget``,
and everything is read anew.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

MAX_LAYERS = 3_000  # of a partition; about 0.5 KB a seed each
MAX_RUNS = 10_000

RunKey = tuple[str, int]
"""(run, incarnation)."""

LayerKey = tuple[str, int, int, str]
"""(run, incarnation, first step, layer): the order of the table's primary key, which ends with the seed."""


@dataclass(slots=True)
class Progress:
    """What was folded of one incarnation: the highest sequence, and in telemetry the highest step. -1: nothing."""

    last_sequence: int = -1
    last_step: int = -1


@dataclass(slots=True)
class OpenWindow:
    """A health window that may grow. ``sums`` is [signals, non-finite, a sum a field, a count a field]."""

    sums: list[Any]
    logged_at: datetime
    log_partition: int
    first_offset: int
    is_stored: bool


@dataclass(slots=True)
class PartitionCache:
    """Valid at ``next_offset`` of the positions table ``table`` (its oid: a swap changes it)."""

    next_offset: int | None = None
    table: int | None = None
    progress: dict[RunKey, Progress] = field(default_factory=dict)
    layers: dict[LayerKey, dict[int, OpenWindow]] = field(default_factory=dict)
    """The windows of a layer's seeds: all that are stored, or the layer is not in here."""
    letters: dict[str, tuple[int, bool]] | None = None
    """Event id -> (offset of its letter, whether it was folded since); None where they were not read."""

    def stand_at(self, next_offset: int, table: int) -> None:
        """Forget everything unless it is of this position of this table."""
        if (self.next_offset, self.table) != (next_offset, table):
            self.forget()
            self.table = table

    def reached(self, next_offset: int) -> None:
        """The transaction that ends here was committed."""
        self.next_offset = next_offset
        if len(self.progress) > MAX_RUNS:
            self.progress.clear()
        if len(self.layers) > MAX_LAYERS:
            self._keep_newest_windows()

    def forget(self) -> None:
        """Read everything anew."""
        self.next_offset = self.table = self.letters = None
        self.progress.clear()
        self.layers.clear()

    def _keep_newest_windows(self) -> None:
        """A dict keeps the order of insertion: the first half was opened longest ago."""
        keys = list(self.layers)
        for key in keys[: len(keys) - MAX_LAYERS // 2]:
            del self.layers[key]
