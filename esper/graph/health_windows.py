"""Tumbling health windows: sums of a seed's signals over WINDOW_STEPS steps.

Folding is one addition a record, in the order of the log: element-wise, so that its bits
depend neither on how the log is cut into batches nor on the machine.
"""

from typing import Any, Protocol

WINDOW_STEPS = 16
"""The width of a window in optimizer steps. Part of the view version: never change one alone."""

FIELDS = ("health_score", "activation_mean", "activation_std", "dead_ratio", "gradient_norm")
"""What a window sums, in this order: stored columns and views have it, so a change is a new view version.

``effective_rank`` is not among them: it is taken on few steps, and no view has it.
"""

COLUMNS = (
    "num_signals",
    "num_non_finite",
    *(f"sum_{name}" for name in FIELDS),
    *(f"count_{name}" for name in FIELDS),
)
"""A window as it is stored, and as a sequence: a statistic that is null is not counted."""

_NOTHING = (0, 0, *(0.0,) * len(FIELDS), *(0,) * len(FIELDS))


class Measured(Protocol):
    """A seed's signal, however it was read."""

    @property
    def non_finite(self) -> bool: ...
    @property
    def health_score(self) -> float: ...
    @property
    def activation_mean(self) -> float | None: ...
    @property
    def activation_std(self) -> float | None: ...
    @property
    def dead_ratio(self) -> float | None: ...
    @property
    def gradient_norm(self) -> float | None: ...


def new_sums() -> list[Any]:
    """A window without signals, in the order of ``COLUMNS``."""
    return list(_NOTHING)


def add_signal(sums: list[Any], signal: Measured) -> None:
    """Add one signal to a window, in place. Written out: it runs for every signal there is."""
    sums[0] += 1
    if signal.non_finite:
        sums[1] += 1
    sums[2] += signal.health_score
    sums[7] += 1
    if (value := signal.activation_mean) is not None:
        sums[3] += value
        sums[8] += 1
    if (value := signal.activation_std) is not None:
        sums[4] += value
        sums[9] += 1
    if (value := signal.dead_ratio) is not None:
        sums[5] += value
        sums[10] += 1
    if (value := signal.gradient_norm) is not None:
        sums[6] += value
        sums[11] += 1


def last_complete_window(step: int) -> int:
    """The first step of the newest window that ends at or before ``step``; negative where there is none."""
    return (step + 1) // WINDOW_STEPS * WINDOW_STEPS - WINDOW_STEPS
