"""Tumbling health windows: sums of a seed's signals over ``WINDOW_STEPS`` steps.

Invariant: signals are added one by one, in log order, so that the bits of a sum depend neither on the batches in which
the log was read nor on the machine.
"""

from typing import Any, Protocol

WINDOW_STEPS = 16
"""The width of a window in optimizer steps. Part of the view version: a change needs a new ``VIEW_VERSION``."""

FIELDS = ("health_score", "activation_mean", "activation_std", "dead_ratio", "gradient_norm")
"""The statistics that a window sums, in the order of stored columns and views: a change needs a new view version.

``effective_rank`` is not among them: it is measured on few steps, and no view has it.
"""

COLUMNS = (
    "num_signals",
    "num_non_finite",
    *(f"sum_{name}" for name in FIELDS),
    *(f"count_{name}" for name in FIELDS),
)
"""The columns of a stored window, and the order of its sums. Null statistics are not counted."""

_EMPTY = (0, 0, *(0.0,) * len(FIELDS), *(0,) * len(FIELDS))


class MeasuredSignal(Protocol):
    """The statistics of a seed's signal, in a contract model or as decoded by a worker."""

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
    """The sums of a window without signals, in the order of ``COLUMNS``."""
    return list(_EMPTY)


def add_signal(sums: list[Any], signal: MeasuredSignal) -> None:
    """Add one signal to a window's sums, in place. The loop is unrolled, since it runs for every signal."""
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
    """The first step of the newest window that ends at or before ``step``; negative if there is none."""
    return (step + 1) // WINDOW_STEPS * WINDOW_STEPS - WINDOW_STEPS
