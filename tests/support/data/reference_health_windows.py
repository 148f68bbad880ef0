"""Health windows added and divided one by one: what the arrays of ``esper.graph.health_arrays`` must give, to the bit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import add
from typing import Any

from esper.graph.health_windows import FIELDS, new_sums


@dataclass(frozen=True, slots=True)
class HealthWindow:
    """What is known of some signals together. ``sums`` has the order of ``COLUMNS``."""

    sums: Sequence[Any] = tuple(new_sums())

    def __add__(self, other: "HealthWindow") -> "HealthWindow":
        """Both together. The bits of a sum depend on the order."""
        return HealthWindow(tuple(map(add, self.sums, other.sums)))

    @property
    def num_signals(self) -> int:
        """How many were added up."""
        return int(self.sums[0])

    @property
    def means(self) -> dict[str, float | None]:
        """The mean of each of ``FIELDS``; None where it was never taken, or where the sum is beyond float64."""
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
        """The share of signals with a statistic that was not finite, 0..1; None where there were no signals."""
        return self.sums[1] / self.sums[0] if self.sums[0] else None


def total_of(windows: Iterable[HealthWindow]) -> HealthWindow:
    """All together, in this order."""
    total = HealthWindow()
    for window in windows:
        total += window
    return total


def change_of(now: HealthWindow, before: HealthWindow) -> dict[str, float | None]:
    """What each mean gained since the window before; None where either is, or where it is beyond float64."""
    found: dict[str, float | None] = dict.fromkeys(FIELDS)
    for name in FIELDS:
        a, b = now.means[name], before.means[name]
        if a is not None and b is not None and isfinite(a - b):
            found[name] = a - b
    return found
