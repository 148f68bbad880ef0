"""The health of all seeds and layers at a boundary, computed from their windows as arrays.

Invariant: sums are added in the order of the rows, and for a layer in the order of its seeds, since the bits of a
floating-point sum depend on the order.

S: seeds, L: layers, N: seeds or layers, W: columns of a window (``esper.graph.health_windows.COLUMNS``).
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from esper.graph.health_windows import COLUMNS, FIELDS
from esper.graph.seed_states import SeedKey
from esper.graph.view_bytes import Columns
from esper.graph.view_rows import Row

Floats = NDArray[np.float64]

_KEY = itemgetter("layer_id", "seed_id")
_SUMS = itemgetter(*COLUMNS)


def seed_sums(windows: Sequence[Row], seed_rows: Mapping[SeedKey, int]) -> Floats:
    """The sum of each seed's windows, (S, W); 0 where it has none.

    Args:
        windows: rows in the order in which they are added.
        seed_rows: seed -> its row in the result; windows of other seeds are left out.
    """
    sums = np.zeros((len(seed_rows), len(COLUMNS)))
    rows = np.fromiter((seed_rows.get(_KEY(w), -1) for w in windows), dtype=np.int64, count=len(windows))
    read = np.fromiter(chain.from_iterable(map(_SUMS, windows)), dtype=np.float64, count=len(windows) * len(COLUMNS))
    is_known = rows >= 0
    with np.errstate(over="ignore", invalid="ignore"):
        np.add.at(sums, rows[is_known], read.reshape(-1, len(COLUMNS))[is_known])
    return sums


def layer_sums(seeds: Floats, num_seeds: Sequence[int]) -> Floats:
    """The sums over each layer's seeds, (L, W), of the sums of seeds, (S, W), which are in the order of layers."""
    counts = np.array(num_seeds, dtype=np.int64)
    first = np.cumsum(counts) - counts
    sums = np.zeros((len(counts), len(COLUMNS)))
    with np.errstate(over="ignore", invalid="ignore"):
        for n in range(counts.max(initial=0)):
            has = np.flatnonzero(counts > n)
            sums[has] += seeds[first[has] + n]
    return sums


class Health(NamedTuple):
    """The health of N seeds or layers over one window.

    Attributes:
        means: (N, 5), in the order of ``FIELDS``; NaN where none was measured, or where the sum is beyond float64.
        non_finite_ratio: (N,), 0..1; NaN where there were no signals.
        num_signals: (N,).
    """

    means: Floats
    non_finite_ratio: Floats
    num_signals: Floats

    @classmethod
    def of(cls, sums: Floats) -> Self:
        """Compute from sums, (N, W)."""
        num_signals, num_non_finite, totals, counts = np.split(sums, (1, 2, 2 + len(FIELDS)), axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(np.isfinite(totals) & (counts > 0), totals / counts, np.nan)
            ratio = num_non_finite / num_signals  # 0 / 0 is NaN
        return cls(means, ratio[:, 0], num_signals[:, 0])

    def columns(self, before: "Health") -> Columns:
        """The health features of a level; ``before`` is the health over the previous window."""
        with np.errstate(over="ignore", invalid="ignore"):
            changes = self.means - before.means
        changes[~np.isfinite(changes)] = np.nan
        found: Columns = {name: _nan_to_none(mean) for name, mean in zip(FIELDS, self.means.T, strict=True)}
        found |= {f"{name}_change": _nan_to_none(change) for name, change in zip(FIELDS, changes.T, strict=True)}
        return {
            **found,
            "non_finite_ratio": _nan_to_none(self.non_finite_ratio),
            "num_signals": self.num_signals.astype(np.int64).tolist(),
        }


def _nan_to_none(values: Floats) -> list[float | None]:
    """(N,) as a list, with None for NaN."""
    numbers: list[float | None] = values.tolist()
    if np.isnan(values).any():
        return [None if v != v else v for v in numbers]
    return numbers
