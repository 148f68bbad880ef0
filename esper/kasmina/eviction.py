"""Which kept kernel goes first: the one whose bytes are worth least.

GreedyDual with frequency: L + uses * cost / size, where cost is what fetching it again would
take and L, the worth of what went last, rises, so that what is not used any more grows old
(Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency", 1998). L
stands for recency, so a kernel must stay in use to keep its place.

Not thread-safe: the cache calls it under its lock. Invariant: the queue holds each kept entry
at most once, so it never grows beyond what is kept.
"""

import heapq
from itertools import count

from esper.kasmina.kernels import LoadedKernel

FETCH_OVERHEAD_BYTES = 1024 * 1024
"""A fetch takes the time of moving so many bytes more than it moves (10 ms at 100 MB/s)."""

MAX_USES = 8
"""Uses beyond these add no worth: a favourite of yesterday must not outlive today's."""


class Entry:
    """A kept kernel. ``size_bytes`` is the sum of its tensors' bytes."""

    __slots__ = (
        "is_kept",
        "is_prefetched",
        "is_queued",
        "kernel",
        "key",
        "pins",
        "size_bytes",
        "uses",
        "worth",
        "worth_of_a_use",
    )

    def __init__(self, kernel: LoadedKernel, *, is_prefetched: bool = False) -> None:
        self.kernel = kernel
        self.key = kernel.kernel_sha256
        self.size_bytes = bytes_of(kernel)
        self.worth_of_a_use = 1.0 + FETCH_OVERHEAD_BYTES / max(1, self.size_bytes)
        self.uses = 1
        self.worth = 0.0
        self.pins = 0
        self.is_prefetched = is_prefetched  # and not used so far
        self.is_kept = True
        self.is_queued = False


class EvictionOrder:
    """The entries that may go, by worth. A touched entry is moved when its turn comes, not before."""

    def __init__(self) -> None:
        self._floor = 0.0  # L
        self._queue: list[tuple[float, int, Entry]] = []
        self._tie = count()

    def touch(self, entry: Entry) -> None:
        """Count a use."""
        if entry.uses < MAX_USES:
            entry.uses += 1
        entry.worth = self._floor + entry.uses * entry.worth_of_a_use

    def add(self, entry: Entry) -> None:
        """A new entry, or one that is pinned no more."""
        entry.worth = self._floor + entry.uses * entry.worth_of_a_use
        if not entry.is_queued:
            self._push(entry)

    def pop(self) -> Entry | None:
        """The entry to give up now; None where all that is kept is pinned."""
        while self._queue:
            worth, _tie, entry = heapq.heappop(self._queue)
            entry.is_queued = False
            if not entry.is_kept or entry.pins:
                continue
            if entry.worth > worth:
                self._push(entry)
                continue
            self._floor = worth
            return entry
        return None

    def _push(self, entry: Entry) -> None:
        entry.is_queued = True
        heapq.heappush(self._queue, (entry.worth, next(self._tie), entry))


def bytes_of(kernel: LoadedKernel) -> int:
    """The sum of its tensors' bytes: elements times element size, as ``load_kernel`` allocated them."""
    return sum(weight.nbytes for weight in kernel.weights.values())
