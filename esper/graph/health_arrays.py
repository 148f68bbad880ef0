"""The health of all seeds and layers at a boundary, from their windows: all of them at once, as arrays.

Invariant: sums are added in the order of the rows, and of a layer's seeds, since the bits of a sum depend on it.

S: seeds, L: layers, N: either, W: the columns of a window (``esper.graph.health_windows.COLUMNS``).
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from esper.graph.health_windows import COLUMNS, FIELDS
from esper.graph.seed_states import SeedKey
from esper.graph.view_encoding import Columns
from esper.graph.view_rows import Row

Floats = NDArray[np.float64]

_KEY = itemgetter("layer_id", "seed_id")
_SUMS = itemgetter(*COLUMNS)


def seed_sums(windows: Sequence[Row], places: Mapping[SeedKey, int]) -> Floats:
    """(S, W): what each seed's windows sum up to; 0 where it has none.

    Args:
        places: seed -> its row; windows of other seeds are left out.
    """
    sums = np.zeros((len(places), len(COLUMNS)))
    rows = np.fromiter((places.get(_KEY(w), -1) for w in windows), dtype=np.int64, count=len(windows))
    read = np.fromiter(chain.from_iterable(map(_SUMS, windows)), dtype=np.float64, count=len(windows) * len(COLUMNS))
    is_known = rows >= 0
    with np.errstate(over="ignore", invalid="ignore"):
        np.add.at(sums, rows[is_known], read.reshape(-1, len(COLUMNS))[is_known])
    return sums


def layer_sums(seeds: Floats, num_seeds: Sequence[int]) -> Floats:
    """(L, W): the sums of each layer's seeds, which are (S, W), the layers' one after the other."""
    counts = np.array(num_seeds, dtype=np.int64)
    first = np.cumsum(counts) - counts
    sums = np.zeros((len(counts), len(COLUMNS)))
    with np.errstate(over="ignore", invalid="ignore"):
        for n in range(counts.max(initial=0)):
            has = np.flatnonzero(counts > n)
            sums[has] += seeds[first[has] + n]
    return sums


class Health(NamedTuple):
    """Of N seeds or layers over one window.

    Attributes:
        means: (N, 5), of ``FIELDS``; NaN where one was never taken, or its sum is beyond float64.
        non_finite_ratio: (N,), 0..1; NaN where there were no signals.
        num_signals: (N,).
    """

    means: Floats
    non_finite_ratio: Floats
    num_signals: Floats

    @classmethod
    def of(cls, sums: Floats) -> Self:
        """From (N, W)."""
        num_signals, num_non_finite, totals, counts = np.split(sums, (1, 2, 2 + len(FIELDS)), axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(np.isfinite(totals) & (counts > 0), totals / counts, np.nan)
            ratio = num_non_finite / num_signals  # 0 / 0 is NaN
        return cls(means, ratio[:, 0], num_signals[:, 0])

    def columns(self, before: "Health") -> Columns:
        """The health features of a level; ``before`` is of the window before."""
        with np.errstate(over="ignore", invalid="ignore"):
            changes = self.means - before.means
        changes[~np.isfinite(changes)] = np.nan
        found: Columns = {name: _told(mean) for name, mean in zip(FIELDS, self.means.T, strict=True)}
        found |= {f"{name}_change": _told(change) for name, change in zip(FIELDS, changes.T, strict=True)}
        return {
            **found,
            "non_finite_ratio": _told(self.non_finite_ratio),
            "num_signals": self.num_signals.astype(np.int64).tolist(),
        }


def _told(values: Floats) -> list[float | None]:
    """(N,) as a list, with None for NaN."""
    told: list[float | None] = values.tolist()
    if np.isnan(values).any():
        return [None if v != v else v for v in told]
    return told
