"""Prioritized experience replay: which experiences are sampled next (Schaul et al. 2016, proportional variant).

    p_i  = (|error_i| + MIN_ERROR) ^ alpha         a new item has the highest p so far
    P(i) = p_i / sum_k p_k                         stratified: one draw from each of k equal parts of the sum
    w_i  = (N * P(i)) ^ -beta / max_j (N * P(j)) ^ -beta,  in (0, 1];  beta rises to 1

Owns priorities and random draws, not the experiences: it holds their indices. Invariant: a node of the tree is the
float sum of its two children, never a running total. The tree depends on the priorities alone, so rounding errors do
not accumulate.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CAPACITY = 100_000
MIN_ERROR = 1e-6
"""Added to every error, so that every item keeps a probability above 0."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class SumTree:
    """A binary tree over ``capacity`` non-negative numbers: their sum, and the number that a point of the sum falls on.

    Raises:
        ValueError: capacity below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.capacity = capacity
        self._depth = max(0, (capacity - 1).bit_length())
        self._width = 1 << self._depth
        self._nodes = np.zeros(2 * self._width)  # the children of n are 2n and 2n + 1; the root is 1

    @property
    def total(self) -> float:
        """The sum of all numbers."""
        return float(self._nodes[1])

    @property
    def leaves(self) -> Floats:
        """The numbers, float64 (capacity,). Do not write to them."""
        return self._nodes[self._width : self._width + self.capacity]

    def set(self, indices: ArrayLike, values: ArrayLike) -> None:
        """Store numbers; of an index that occurs twice the last value counts.

        Raises:
            IndexError: an index outside 0..capacity-1.
            ValueError: a value below 0, or not finite.
        """
        where, what = np.atleast_1d(np.asarray(indices, np.int64)), np.asarray(values, np.float64)
        what = np.broadcast_to(what, where.shape)
        if where.size and (where.min() < 0 or where.max() >= self.capacity):
            raise IndexError(f"indices must be in 0..{self.capacity - 1}")
        if not np.all((what >= 0) & np.isfinite(what)):
            raise ValueError("values must be finite and at least 0")
        last = dict(zip(where.tolist(), what.tolist(), strict=True))
        changed = np.fromiter(last.keys(), np.int64, len(last)) + self._width
        self._nodes[changed] = np.fromiter(last.values(), np.float64, len(last))
        for _level in range(self._depth):
            changed = np.unique(changed >> 1)
            self._nodes[changed] = self._nodes[2 * changed] + self._nodes[2 * changed + 1]

    def find(self, points: ArrayLike) -> Ints:
        """Return for each point of 0..total the index it falls on: the first whose running sum exceeds the point.

        An index whose number is 0 is never returned, however sums round.

        Raises:
            ValueError: all numbers are 0.
        """
        if self.total <= 0.0:
            raise ValueError("nothing to find: all numbers are 0")
        left = np.atleast_1d(np.array(points, np.float64))
        node = np.ones(left.shape, np.int64)
        for _level in range(self._depth):
            lower, upper = self._nodes[2 * node], self._nodes[2 * node + 1]
            goes_up = (lower <= 0.0) | ((upper > 0.0) & (left >= lower))
            left = np.where(goes_up, left - lower, left)
            node = 2 * node + goes_up
        return node - self._width


class Sample(NamedTuple):
    """Sampled items, one row each.

    Attributes:
        slots: their places in the buffer, for ``update``, int64.
        items: the indices of the experiences, int64.
        weights: importance weights of their errors, in (0, 1], float64.
    """

    slots: Ints
    items: Ints
    weights: Floats


class PrioritizedReplay:
    """A ring buffer of the last ``capacity`` items. Equal seeds and calls give equal draws.

    Args:
        alpha: exponent of the priorities; 0 samples uniformly.
        beta: exponent of the bias correction at the start; 1 corrects it fully.
        num_annealed: number of drawn items over which ``beta`` rises linearly to 1.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        capacity: int = CAPACITY,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        num_annealed: int = 1_000_000,
        rng_seed: int = 0,
    ) -> None:
        if not (alpha >= 0.0 and 0.0 <= beta <= 1.0 and num_annealed >= 1):
            raise ValueError("alpha must be at least 0, beta in 0..1, num_annealed at least 1")
        self.alpha, self.first_beta, self.num_annealed = alpha, beta, num_annealed
        self._tree = SumTree(capacity)
        self._items = np.full(capacity, -1, np.int64)
        self._rng = np.random.Generator(np.random.PCG64(rng_seed))
        self._next = self._size = self._num_drawn = 0
        self._highest = 1.0

    def __len__(self) -> int:
        return self._size

    @property
    def beta(self) -> float:
        """The current exponent of the bias correction."""
        share = min(1.0, self._num_drawn / self.num_annealed)
        return self.first_beta + (1.0 - self.first_beta) * share

    @property
    def probabilities(self) -> Floats:
        """The sampling probability of each slot in use, float64 (len,)."""
        priorities = self._tree.leaves[: self._size]
        return priorities / priorities.sum() if self._size else priorities.copy()

    def add(self, items: ArrayLike) -> None:
        """Add items with the highest priority so far; the oldest are overwritten."""
        new = np.atleast_1d(np.asarray(items, np.int64))[-self._tree.capacity :]
        slots = (self._next + np.arange(len(new))) % self._tree.capacity
        self._items[slots] = new
        self._tree.set(slots, self._highest)
        self._next = int((self._next + len(new)) % self._tree.capacity)
        self._size = min(self._tree.capacity, self._size + len(new))

    def draw(self, num: int) -> Sample:
        """Sample items by priority, with replacement.

        Raises:
            ValueError: the buffer is empty, or ``num`` is below 1.
        """
        if num < 1 or not self._size:
            raise ValueError(f"cannot draw {num} of {self._size} items")
        points = (np.arange(num) + self._rng.random(num)) * (self._tree.total / num)
        slots = self._tree.find(points)
        priorities = self._tree.leaves
        weights = (priorities[slots] / priorities[: self._size].min()) ** -self.beta  # N and the sum cancel
        self._num_drawn += num
        return Sample(slots, self._items[slots], weights)

    def update(self, slots: ArrayLike, errors: ArrayLike) -> None:
        """Set the priorities of slots from the errors of their items; of a repeated slot the last error counts.

        Raises:
            ValueError: an error is not finite.
            IndexError: a slot is empty.
        """
        where, wrong = np.atleast_1d(np.asarray(slots, np.int64)), np.abs(np.asarray(errors, np.float64))
        if where.size and (where.min() < 0 or where.max() >= self._size):
            raise IndexError(f"slots must be in 0..{self._size - 1}")
        if not np.all(np.isfinite(wrong)):
            raise ValueError("errors must be finite")
        priorities = (wrong + MIN_ERROR) ** self.alpha
        self._tree.set(where, priorities)
        self._highest = max(self._highest, float(np.max(priorities, initial=0.0)))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that later draws depend on: arrays, counters and the generator's state."""
        return {
            "priorities": self._tree.leaves.copy(),
            "items": self._items.copy(),
            "next": self._next,
            "size": self._size,
            "num_drawn": self._num_drawn,
            "highest": self._highest,
            "rng": copy.deepcopy(self._rng.bit_generator.state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; later draws are those of the buffer that it was taken from.

        Raises:
            ValueError: that buffer has another capacity.
        """
        if len(state["items"]) != self._tree.capacity:
            raise ValueError(f"the state has capacity {len(state['items'])}, this buffer {self._tree.capacity}")
        self._tree.set(np.arange(self._tree.capacity), state["priorities"])
        self._items[:] = state["items"]
        self._next, self._size, self._num_drawn = int(state["next"]), int(state["size"]), int(state["num_drawn"])
        self._highest = float(state["highest"])
        self._rng.bit_generator.state = copy.deepcopy(state["rng"])
