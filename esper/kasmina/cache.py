"""KernelCache: verified kernels in memory by their SHA-256, within a number of bytes.

Owns what is kept, what is pinned and the count of both; ``eviction`` says what goes first,
``patterns`` what may be wanted next, ``flights`` who fetches. It fetches nothing itself.

Thread-safe. A hit waits for no lock: it is counted by one atomic step and noted in a short queue,
and whoever finds the lock free works the notes off. Where threads hit faster than that, notes are
lost, never counts: what is lost is a little of the order in which kernels go.

Invariant: ``bytes`` is the sum of the kept kernels' tensors, and no more than the capacity
unless pinned kernels alone are more.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import Any

from esper.errors import ContractError
from esper.kasmina.eviction import Entry, EvictionOrder, bytes_of
from esper.kasmina.flights import Claim, Flight
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.patterns import AccessPatterns

MIB = 1024 * 1024
DEFAULT_CAPACITY_BYTES = 128 * MIB
MAX_KERNELS_KEPT = 8192  # a kernel costs some 4 KB beside its tensors, and there are kernels without any
MAX_PREFETCHED_SHARE = 0.25  # of the capacity, for kernels that were fetched early and not used so far
NOTED_HITS = 32  # are worked off at once: some 10 us, so no lookup is held up for longer
MAX_NOTED_HITS = 2 * NOTED_HITS  # older notes are lost


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was made, and what it holds now.

    A lookup that found nothing is a miss, also where it then waits for a fetch that is under way;
    ``fetches`` are those that were begun because of misses.
    ``prefetched_used`` are the prefetched kernels that were looked up before they went.
    """

    hits: int
    misses: int
    fetches: int
    evictions: int
    prefetched: int
    prefetched_used: int
    num_kernels: int
    bytes: int
    pinned_bytes: int


class KernelCache:
    """See the module. A copy, also a pickled one, is a new, empty cache of the same capacity."""

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        """``capacity_bytes`` 0 keeps nothing but what is pinned.

        Raises:
            ContractError: the capacity is negative.
        """
        if capacity_bytes < 0:
            raise ContractError(f"a cache cannot hold {capacity_bytes} bytes")
        self.capacity_bytes = capacity_bytes
        self._lock = Lock()
        self._entries: dict[str, Entry] = {}
        self._flights: dict[str, Flight] = {}
        self._noted: deque[Entry] = deque(maxlen=MAX_NOTED_HITS)
        self._hit_numbers = count()  # its next() is atomic, as += is not
        self._num_hit_readings = 0
        self._order = EvictionOrder()
        self._patterns = AccessPatterns()
        self._bytes = self._pinned_bytes = self._prefetched_bytes = 0
        self._misses = self._fetches = self._evictions = self._prefetched = self._prefetched_used = 0

    def __reduce__(self) -> tuple[type["KernelCache"], tuple[int]]:
        return type(self), (self.capacity_bytes,)

    # -- lookups and fetches ----------------------------------------------------------------

    def get(self, key: str) -> LoadedKernel | None:
        """The kernel, if it is here. Counts a hit or a miss."""
        entry = self._entries.get(key)
        if entry is None or entry.is_prefetched:
            return self._get_noteworthy(key)
        next(self._hit_numbers)
        self._noted.append(entry)
        if len(self._noted) >= NOTED_HITS and self._lock.acquire(blocking=False):
            try:
                self._work_off_hits()
            finally:
                self._lock.release()
        return entry.kernel

    def _get_noteworthy(self, key: str) -> LoadedKernel | None:
        """A miss, or the first use of a prefetched kernel: these are never lost."""
        with self._lock:
            self._work_off_hits()
            self._patterns.learn(key)
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            next(self._hit_numbers)
            self._use_early(entry)
            self._order.touch(entry)
            return entry.kernel

    def claim(self, key: str, *, is_prefetch: bool = False) -> Claim:
        """Take part in fetching a kernel that ``get`` did not have. Counts nothing.

        The first to claim leads; where the kernel came in meanwhile, the future is done.
        """
        with self._lock:
            flight, leads = self._flights.get(key), False
            entry = self._entries.get(key)
            if entry is not None:
                flight = Flight(is_wanted=True)
                flight.future.set_result(entry.kernel)
            elif flight is None:
                flight, leads = Flight(is_wanted=not is_prefetch), True
                self._flights[key] = flight
                self._fetches += not is_prefetch
            elif not is_prefetch:
                flight.is_wanted = True
        return Claim(flight, leads=leads, land=lambda f, kernel: self._land(key, f, kernel, is_prefetch=is_prefetch))

    def get_or_fetch(self, key: str, fetch: Callable[[], LoadedKernel]) -> LoadedKernel:
        """The kernel from here or from ``fetch``, which one thread of all that ask calls; the others wait.

        The requirement of one fetch for many waiters; bench_kasmina_cache.py measures it.

        Raises:
            Exception: what ``fetch`` raised, in every thread that waited. Nothing is kept then.
        """
        kernel = self.get(key)
        while kernel is None:
            claim = self.claim(key)
            if not claim.leads:
                kernel = claim.future.result()
                continue
            with claim:
                kernel = fetch()
                claim.deliver(kernel)
        return kernel

    # -- pins -------------------------------------------------------------------------------

    def pin(self, kernel: LoadedKernel) -> None:
        """Keep a kernel until it is unpinned as often as it was pinned, whatever its size."""
        with self._lock:
            entry = self._entries.get(kernel.kernel_sha256) or self._add(Entry(kernel))
            self._use_early(entry)
            entry.pins += 1
            if entry.pins == 1:
                self._pinned_bytes += entry.size_bytes
            self._make_room()

    def unpin(self, key: str) -> None:
        """Take one pin back.

        Raises:
            ContractError: the kernel is not pinned.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.pins:
                raise ContractError(f"kernel {key[:12]} is not pinned")
            entry.pins -= 1
            if entry.pins:
                return
            self._pinned_bytes -= entry.size_bytes
            if entry.size_bytes > self.capacity_bytes:
                self._drop(entry)
            else:
                self._order.add(entry)
            self._make_room()

    @property
    def is_full_of_pins(self) -> bool:
        """Whether pinned kernels alone take more than the capacity: nothing else can be kept."""
        return self._pinned_bytes > self.capacity_bytes

    # -- what was learnt --------------------------------------------------------------------

    def predictions(self, after: str | None = None) -> tuple[str, ...]:
        """Kernels worth fetching early, the likeliest first; none that is here or on its way.

        All together they fit into what prefetched kernels may take.

        Args:
            after: the kernel that was looked up last; None at the start of a run.
        """
        with self._lock:
            self._work_off_hits()
            room = self._prefetch_room
            found = []
            for key, size_bytes in self._patterns.predictions(after):
                if 0 <= size_bytes <= room and key not in self._entries and key not in self._flights:
                    found.append(key)
                    room -= size_bytes
        return tuple(found)

    def learnt(self) -> dict[str, Any]:
        """The access patterns as JSON can hold them; for ``learn_from``, in this process or another."""
        with self._lock:
            self._work_off_hits()
            return self._patterns.to_dict()

    def learn_from(self, learnt: Mapping[str, Any]) -> None:
        """Know what another cache had learnt, beside what this one did.

        Raises:
            ContractError: ``learnt`` is not what ``learnt()`` gives.
        """
        with self._lock:
            self._patterns.load_dict(learnt)

    @property
    def stats(self) -> CacheStats:
        """Everything that was counted, of one moment."""
        with self._lock:
            hits = next(self._hit_numbers) - self._num_hit_readings  # reading it counts too
            self._num_hit_readings += 1
            return CacheStats(
                hits,
                self._misses,
                self._fetches,
                self._evictions,
                self._prefetched,
                self._prefetched_used,
                len(self._entries),
                self._bytes,
                self._pinned_bytes,
            )

    # -- under the lock ---------------------------------------------------------------------

    @property
    def _prefetch_room(self) -> int:
        return int(self.capacity_bytes * MAX_PREFETCHED_SHARE) - self._prefetched_bytes

    def _work_off_hits(self) -> None:
        noted, touch, learn = self._noted, self._order.touch, self._patterns.learn
        for _n in range(len(noted)):
            entry = noted.popleft()
            touch(entry)
            learn(entry.key)

    def _use_early(self, entry: Entry) -> None:
        if entry.is_prefetched:
            entry.is_prefetched = False
            self._prefetched_used += 1
            self._prefetched_bytes -= entry.size_bytes

    def _land(self, key: str, flight: Flight, kernel: LoadedKernel | None, *, is_prefetch: bool) -> None:
        if kernel is not None and kernel.kernel_sha256 != key:
            raise ContractError(f"kernel {kernel.kernel_sha256[:12]} was delivered for {key[:12]}")
        with self._lock:
            del self._flights[key]
            if kernel is None:
                return
            size_bytes = bytes_of(kernel)
            self._patterns.note_size(key, size_bytes)
            self._prefetched += is_prefetch
            is_early = is_prefetch and not flight.is_wanted
            self._prefetched_used += is_prefetch and flight.is_wanted
            if key in self._entries or size_bytes > (self._prefetch_room if is_early else self.capacity_bytes):
                return
            self._add(Entry(kernel, is_prefetched=is_early))
            self._make_room()

    def _add(self, entry: Entry) -> Entry:
        self._entries[entry.key] = entry
        self._bytes += entry.size_bytes
        if entry.is_prefetched:
            self._prefetched_bytes += entry.size_bytes
        self._order.add(entry)
        return entry

    def _make_room(self) -> None:
        while self._bytes > self.capacity_bytes or len(self._entries) > MAX_KERNELS_KEPT:
            entry = self._order.pop()
            if entry is None:
                return
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.key]
        entry.is_kept = False
        self._bytes -= entry.size_bytes
        self._evictions += 1
        if entry.is_prefetched:
            self._prefetched_bytes -= entry.size_bytes
