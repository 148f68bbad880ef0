"""The kernel cache beside plain LRU and LFU on the same traces; its lookups, its threads, its memory.

`python tests/benchmarks/kasmina/bench_kasmina_cache.py`. Sizes are real, kernels are not: a trace has many thousand of them.
A prefetch is taken to arrive before the next lookup (seeds germinate seconds apart, a fetch takes milliseconds).
"""

import gc
import json
import random
import statistics
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cachetools
import psutil
import torch

from esper.kasmina.cache import MIB, KernelCache
from esper.kasmina.kernels import LoadedKernel
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind

TRACES = Path(__file__).parent / "traces"
SHARES = (0.1, 0.25, 0.5)  # of the bytes of all kernels in a trace
LOOKUPS, THREADS, ROUNDS = 200_000, (1, 2, 8, 32), 7
LEAK_OPERATIONS = 1_000_000
GOES = (range(1, 2), range(2, 4), range(4, 8), range(8, 16), range(16, 25))  # the n-th runs of one shape of model
SPEC = BlueprintSpec(module="affine", targets=(LayerKind.LINEAR,))

Trace = tuple[list[int], dict[int, int]]
"""Which kernel is looked up, and each one's bytes."""


class _Weight:
    """A tensor's size without its memory: the traces have far more bytes than this machine."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def kernel(name: str, size_bytes: int) -> LoadedKernel:
    weights: dict[str, Any] = {"w": _Weight(size_bytes)}
    return LoadedKernel(name, "affine", SPEC, LayerKind.LINEAR, 8, weights)


# -- traces ---------------------------------------------------------------------------------


def zipf(chance: random.Random, names: Iterable[int], count: int, power: float) -> list[int]:
    ranked = list(names)
    chance.shuffle(ranked)
    return chance.choices(ranked, [1 / (n + 1) ** power for n in range(len(ranked))], k=count)


def synthetic() -> dict[str, Trace]:
    chance = random.Random(1)
    sizes = {n: int(min(32 * MIB, chance.lognormvariate(12, 2.2))) for n in range(2000)}
    scanned, fresh = [], 0
    for n, name in enumerate(zipf(chance, range(200), 20_000, 0.9)):
        scanned.append(name)
        if n % 1000 == 999:  # somebody goes through a hundred kernels that nobody asks for again
            scanned += [400 + (fresh + k) % 1600 for k in range(100)]
            fresh += 100
    phases = [n for _p in range(10) for n in zipf(chance, chance.sample(range(2000), 150), 2000, 0.7)]
    return {
        "zipf": (zipf(chance, range(400), 20_000, 0.9), sizes),
        "zipf and scans": (scanned, sizes),
        "phases": (phases, sizes),
        "loop": (list(range(300)) * 30, sizes),
    }


def recorded() -> tuple[Trace, list[str]]:
    """The lookups of growing runs, and the run of each."""
    found = json.loads((TRACES / "growth.json").read_text())
    names = [name for _run, name in found["asked"]]
    return (names, dict(enumerate(found["size_bytes"]))), [found["runs"][run] for run, _name in found["asked"]]


# -- hit rates ------------------------------------------------------------------------------


def plain_hits(cache: cachetools.Cache, trace: Trace) -> float:
    """Share of hits of one of cachetools', sized by bytes."""
    names, sizes = trace
    hits = 0
    for name in names:
        if cache.get(name) is not None:
            hits += 1
        elif sizes[name] <= cache.maxsize:
            cache[name] = sizes[name]
    return hits / len(names)


def look_up(cache: KernelCache, name: int, size_bytes: int) -> None:
    key = str(name)
    cache.get_or_fetch(key, lambda: kernel(key, size_bytes))


def prefetch(cache: KernelCache, after: str | None, sizes: dict[int, int]) -> None:
    for key in cache.predictions(after):
        with cache.claim(key, is_prefetch=True) as claim:
            claim.deliver(kernel(key, sizes[int(key)]))


def our_hits(capacity_bytes: int, trace: Trace, *, with_prefetch: bool) -> KernelCache:
    names, sizes = trace
    cache = KernelCache(capacity_bytes)
    for name in names:
        look_up(cache, name, sizes[name])
        if with_prefetch:
            prefetch(cache, str(name), sizes)
    return cache


def rate(cache: KernelCache) -> float:
    stats = cache.stats
    return stats.hits / (stats.hits + stats.misses)


def compare_hit_rates() -> None:
    print("hit rate in %; capacity as a share of the bytes of all kernels in the trace")
    print(
        f"{'trace':16} {'kernels':>8} {'MiB':>6} {'share':>6} {'LRU':>6} {'LFU':>6} {'ours':>6} {'+early':>7}   early: used of fetched"
    )
    for name, trace in {**synthetic(), "growth": recorded()[0]}.items():
        different = set(trace[0])
        total = sum(trace[1][n] for n in different)
        for share in SHARES:
            capacity = int(total * share)
            lru = plain_hits(cachetools.LRUCache(capacity, lambda v: v), trace)
            lfu = plain_hits(cachetools.LFUCache(capacity, lambda v: v), trace)
            ours, early = (our_hits(capacity, trace, with_prefetch=p) for p in (False, True))
            told = f"{early.stats.prefetched_used} of {early.stats.prefetched}"
            print(
                f"{name:16} {len(different):8} {total / MIB:6.0f} {share:6} {100 * lru:6.1f} {100 * lfu:6.1f} "
                f"{100 * rate(ours):6.1f} {100 * rate(early):7.1f}   {told}"
            )


def growth_at_the_default() -> None:
    """The recorded work with 128 MiB: one cache for all, one for each run, and one that learnt from runs before."""
    (names, sizes), runs = recorded()
    total = sum(sizes[n] for n in set(names))
    print(f"\nrecorded growth, 128 MiB for {total / MIB:.0f} MiB of kernels: hit rate in %")
    lru = plain_hits(cachetools.LRUCache(128 * MIB, lambda v: v), (names, sizes))
    print(
        f"  one cache for all runs: LRU {100 * lru:.1f}, ours {100 * rate(our_hits(128 * MIB, (names, sizes), with_prefetch=True)):.1f}"
    )
    by_run = {run: [n for n, r in zip(names, runs, strict=True) if r == run] for run in dict.fromkeys(runs)}
    again = sum(len(asked) - len(set(asked)) for asked in by_run.values())
    print(f"  a cache for each run, nothing learnt, whatever the policy: {100 * again / len(names):.1f}")
    print("  a cache for each run that knows what the runs of its shape before asked for:")
    learnt: dict[str, dict[str, Any]] = {}
    counted = [[0, 0, 0, 0] for _range in GOES]
    for run, asked in by_run.items():
        model, go = run.rsplit("-", 1)
        cache = KernelCache()
        if model in learnt:
            cache.learn_from(learnt[model])
        prefetch(cache, None, sizes)
        for name in asked:
            look_up(cache, name, sizes[name])
            prefetch(cache, str(name), sizes)
        learnt[model], stats = cache.learnt(), cache.stats
        row = counted[next(n for n, goes in enumerate(GOES) if int(go) + 1 in goes)]
        for n, count in enumerate((stats.hits, len(asked), stats.prefetched_used, stats.prefetched)):
            row[n] += count
    for goes, (hits, count, used, early) in zip(GOES, counted, strict=True):
        print(f"    run {goes[0]:2} to {goes[-1]:2}: {100 * hits / count:5.1f}   early: {used} used of {early} fetched")


# -- time and memory ------------------------------------------------------------------------


def filled(count: int) -> tuple[KernelCache, list[str]]:
    cache, keys = KernelCache(), [f"{n:064x}" for n in range(count)]
    for key in keys:
        cache.pin(kernel(key, 1000))
    return cache, keys


def ns_each(work: Callable[[], None], count: int) -> float:
    """Of this thread's own time: others may be busy on the machine."""
    began = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - began) / count


def lookup_times() -> None:
    cache, keys = filled(1000)
    order = [keys[n] for n in random.Random(0).choices(range(1000), k=LOOKUPS)]

    def same() -> None:
        get, key = cache.get, keys[0]
        for _n in range(LOOKUPS):
            get(key)

    def mixed() -> None:
        get = cache.get
        for key in order:
            get(key)

    def absent() -> None:
        get = cache.get
        for _n in range(LOOKUPS):
            get("absent")

    print("\nlookups, one thread: median ns of CPU time (least..most of the rounds), with the upkeep that it causes")
    times: dict[str, list[float]] = {"one kernel": [], "1000 kernels at random": [], "a miss": []}
    for _round in range(ROUNDS):
        for name, work in zip(times, (same, mixed, absent), strict=True):
            times[name].append(ns_each(work, LOOKUPS))
    for name, taken in times.items():
        print(f"  {name:24} {statistics.median(taken):7.0f} ({min(taken):.0f}..{max(taken):.0f})")
    each = []
    for key in order[:50_000]:
        began = time.perf_counter_ns()
        cache.get(key)
        each.append(time.perf_counter_ns() - began)
    marks = statistics.quantiles(each, n=1000)
    print(f"  one by one, clock included: p50 {marks[499]:.0f}, p99 {marks[989]:.0f}, p99.9 {marks[998]:.0f} ns")


def thread_rates() -> None:
    cache, keys = filled(100)

    def seconds(num_threads: int) -> float:
        start = threading.Barrier(num_threads + 1)

        def work() -> None:
            get = cache.get
            start.wait()
            for n in range(LOOKUPS // num_threads):
                get(keys[n % 100])

        threads = [threading.Thread(target=work) for _n in range(num_threads)]
        for thread in threads:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    rates: dict[int, list[float]] = {n: [] for n in THREADS}
    for _round in range(2 * ROUNDS + 1):
        for num_threads in THREADS:
            rates[num_threads].append(LOOKUPS / seconds(num_threads))
    print("\nthreads: hits a second of all together, and as a ratio to one thread's in the same round")
    for num_threads, found in rates.items():
        ratios = sorted(r / one for r, one in zip(found, rates[1], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"  {num_threads:2} {statistics.median(found) / 1e6:6.2f} million/s  {statistics.median(ratios):5.2f} "
            f"(half of the rounds in {low:.2f}..{high:.2f})"
        )


def leak() -> None:
    """A million operations of every sort over far more kernels than fit; what memory holds at each tenth."""
    cache, chance, process = KernelCache(64 * 1024), random.Random(0), psutil.Process()
    weights = {"w": torch.zeros(256)}
    at = []

    def use(count: int) -> None:
        for n in range(count):
            key = f"{min(int(chance.paretovariate(0.5)), 100_000):064x}"
            found = cache.get(key)
            if found is None:
                with cache.claim(key, is_prefetch=n % 8 == 0) as claim:
                    claim.deliver(found := LoadedKernel(key, "affine", SPEC, LayerKind.LINEAR, 8, weights))
            if n % 16 == 0:
                cache.pin(found)
                cache.predictions(key)
                cache.unpin(key)

    began = time.perf_counter()
    for _tenth in range(10):
        use(LEAK_OPERATIONS // 10)
        gc.collect()
        at.append(process.memory_info().rss / MIB)
    taken = time.perf_counter() - began
    tracemalloc.start()
    use(100_000)
    first = tracemalloc.get_traced_memory()[0]
    use(100_000)
    second = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    print(f"\nleak: {LEAK_OPERATIONS:,} operations in {taken:.1f} s, {cache.stats.evictions:,} evictions")
    print(f"  MiB resident at each tenth: {', '.join(f'{m:.1f}' for m in at)}")
    print(f"  allocated by Python after 100,000 further ones: {(second - first) / 1024:+.1f} KiB")


def main() -> None:
    torch.set_num_threads(1)
    compare_hit_rates()
    growth_at_the_default()
    lookup_times()
    thread_rates()
    leak()


if __name__ == "__main__":
    main()
