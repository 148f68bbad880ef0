"""Tumbling health windows: sums of a seed's signals over WINDOW_STEPS steps.

Folding is one addition a record, in the order of the log: element-wise, so that its bits
depend neither on how the log is cut into batches nor on the machine.
"""

import math
from dataclasses import dataclass
from typing import Any

from esper.schemas.operational import HealthSignal

WINDOW_STEPS = 16
"""The width of a window in optimizer steps. Part of the view version: never change one alone."""

FIELDS = ("health_score", "activation_mean", "activation_std", "dead_ratio", "gradient_norm")
"""What a window sums, in this order: stored arrays and views have it, so a change is a new view version.

``effective_rank`` is not among them: it is taken on few steps, and no view has it.
"""

WindowKey = tuple[str, int, str, int, int]
"""(run, incarnation, layer, seed, first step)."""


@dataclass(frozen=True, slots=True)
class HealthWindow:
    """Sums and counts, one for each of ``FIELDS``; a statistic that is null is not counted."""

    num_signals: int = 0
    num_non_finite: int = 0
    sums: tuple[float, ...] = (0.0,) * len(FIELDS)
    counts: tuple[int, ...] = (0,) * len(FIELDS)

    def add(self, signal: HealthSignal) -> "HealthWindow":
        """The window with one more signal in it."""
        values = [getattr(signal, name) for name in FIELDS]
        return HealthWindow(
            self.num_signals + 1,
            self.num_non_finite + signal.non_finite,
            tuple(s if v is None else s + v for s, v in zip(self.sums, values, strict=True)),
            tuple(c + (v is not None) for c, v in zip(self.counts, values, strict=True)),
        )

    def __add__(self, other: "HealthWindow") -> "HealthWindow":
        """Both together. The bits of a sum depend on the order."""
        return HealthWindow(
            self.num_signals + other.num_signals,
            self.num_non_finite + other.num_non_finite,
            tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
        )

    @property
    def means(self) -> dict[str, float | None]:
        """The mean of each field; None where it was never taken, or where the sum is beyond float64."""
        pairs = zip(FIELDS, self.sums, self.counts, strict=True)
        return {name: total / count if count and math.isfinite(total) else None for name, total, count in pairs}

    @property
    def non_finite_ratio(self) -> float | None:
        """The share of signals with a statistic that was not finite, 0..1; None where there were no signals."""
        return self.num_non_finite / self.num_signals if self.num_signals else None

    @property
    def columns(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "num_signals": self.num_signals,
            "num_non_finite": self.num_non_finite,
            "sums": list(self.sums),
            "counts": list(self.counts),
        }


def last_complete_window(step: int) -> int:
    """The first step of the newest window that ends at or before ``step``; negative where there is none."""
    return (step + 1) // WINDOW_STEPS * WINDOW_STEPS - WINDOW_STEPS
