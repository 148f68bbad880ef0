"""Health windows computed one by one: ``esper.graph.health_arrays`` must give the same bits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import add
from typing import Any

from esper.graph.health_windows import FIELDS, new_sums


@dataclass(frozen=True, slots=True)
class HealthWindow:
    """Sums over some signals, in the order of ``COLUMNS``."""

    sums: Sequence[Any] = tuple(new_sums())

    def __add__(self, other: "HealthWindow") -> "HealthWindow":
        """Add two windows. The bits of a sum depend on the order."""
        return HealthWindow(tuple(map(add, self.sums, other.sums)))

    @property
    def num_signals(self) -> int:
        """Number of signals."""
        return int(self.sums[0])

    @property
    def means(self) -> dict[str, float | None]:
        """The mean of each of ``FIELDS``; None without a value, or if the sum exceeds float64."""
        _n, _bad, score, mean, std, dead, norm, scores, means, stds, deads, norms = self.sums
        return {
            "health_score": score / scores if scores and isfinite(score) else None,
            "activation_mean": mean / means if means and isfinite(mean) else None,
            "activation_std": std / stds if stds and isfinite(std) else None,
            "dead_ratio": dead / deads if deads and isfinite(dead) else None,
            "gradient_norm": norm / norms if norms and isfinite(norm) else None,
        }

    @property
    def non_finite_ratio(self) -> float | None:
        """The share of signals with a non-finite statistic, 0..1; None without signals."""
        return self.sums[1] / self.sums[0] if self.sums[0] else None


def total_of(windows: Iterable[HealthWindow]) -> HealthWindow:
    """Return the sum of windows, in this order."""
    total = HealthWindow()
    for window in windows:
        total += window
    return total


def change_of(now: HealthWindow, before: HealthWindow) -> dict[str, float | None]:
    """Return the change of each mean since the previous window; None if either is None, or if it exceeds float64."""
    found: dict[str, float | None] = dict.fromkeys(FIELDS)
    for name in FIELDS:
        a, b = now.means[name], before.means[name]
        if a is not None and b is not None and isfinite(a - b):
            found[name] = a - b
    return found
