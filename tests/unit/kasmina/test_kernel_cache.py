"""The kernel cache: bytes to the byte, one fetch for many, pins that hold, predictions that do not hurt."""

import asyncio
import copy
import pickle
import threading
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.conditions import wait_until

from esper.connection.checkpoints.access_history import load_access_history, save_access_history
from esper.errors import ContractError, UnavailableError
from esper.kasmina.cache import MAX_PREFETCHED_SHARE, KernelCache
from esper.kasmina.flights import Claim
from esper.kasmina.kernels import LoadedKernel
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind

SPEC = BlueprintSpec(module="affine", targets=(LayerKind.LINEAR,))
CAPACITY_BYTES = 1000
KEYS = [f"{n:064x}" for n in range(12)]
SIZES_BYTES = dict(zip(KEYS, [0, 4, 40, 40, 100, 200, 240, 248, 252, 600, 1000, 1200], strict=True))


def kernel(key: str) -> LoadedKernel:
    size = SIZES_BYTES[key]
    weights = {"a": torch.zeros(size // 8), "b": torch.zeros(size // 8, dtype=torch.float32)} if size % 8 == 0 else {
        "a": torch.zeros(size // 4)
    }  # fmt: skip
    return LoadedKernel(key, "affine", SPEC, LayerKind.LINEAR, 8, weights)


def tensor_bytes(cache: KernelCache) -> int:
    kept = [entry.kernel for entry in cache._entries.values()]
    return sum(w.numel() * w.element_size() for k in kept for w in k.weights.values())


class AnyUse(RuleBasedStateMachine):
    """Any sequence of uses, beside plain counts of what it must come to."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KernelCache(CAPACITY_BYTES)
        self.lookups = 0
        self.pins: Counter[str] = Counter()

    @rule(key=st.sampled_from(KEYS))
    def look_up(self, key: str) -> None:
        self.lookups += 1
        assert self.cache.get_or_fetch(key, lambda: kernel(key)).kernel_sha256 == key

    @rule(key=st.sampled_from(KEYS))
    def fail(self, key: str) -> None:
        self.lookups += 1
        before = self.cache.stats

        def fetch() -> LoadedKernel:
            raise UnavailableError("away")

        try:
            self.cache.get_or_fetch(key, fetch)
        except UnavailableError:
            assert self.cache.stats.bytes == before.bytes

    @rule(key=st.sampled_from(KEYS))
    def prefetch(self, key: str) -> None:
        with self.cache.claim(key, is_prefetch=True) as claim:
            if claim.leads:
                claim.deliver(kernel(key))

    @rule(key=st.sampled_from(KEYS))
    def pin(self, key: str) -> None:
        self.cache.pin(kernel(key))
        self.pins[key] += 1

    @precondition(lambda self: self.pins.total())
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.pins.keys())))
        self.cache.unpin(key)
        self.pins -= Counter([key])

    @rule(after=st.none() | st.sampled_from(KEYS))
    def predict(self, after: str | None) -> None:
        predicted = self.cache.predictions(after)
        assert not set(predicted) & self.cache._entries.keys()
        assert sum(SIZES_BYTES[k] for k in predicted) <= MAX_PREFETCHED_SHARE * CAPACITY_BYTES

    @invariant()
    def every_byte_is_accounted_for(self) -> None:
        stats = self.cache.stats
        assert stats.bytes == tensor_bytes(self.cache)
        assert stats.num_kernels == len(self.cache._entries)
        assert stats.pinned_bytes == sum(SIZES_BYTES[k] for k in self.pins)
        assert stats.bytes <= max(CAPACITY_BYTES, stats.pinned_bytes)
        assert self.cache.is_full_of_pins == (stats.pinned_bytes > CAPACITY_BYTES)
        assert stats.hits + stats.misses == self.lookups
        assert stats.prefetched_used <= stats.prefetched
        unused = [e.size_bytes for e in self.cache._entries.values() if e.is_prefetched]
        assert sum(unused) == self.cache._prefetched_bytes <= MAX_PREFETCHED_SHARE * CAPACITY_BYTES

    @invariant()
    def what_is_pinned_stays(self) -> None:
        assert self.pins.keys() <= self.cache._entries.keys()
        assert len(self.cache._order._queue) <= len(self.cache._entries)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class CountedClaims(KernelCache):
    """Says what was claimed."""

    def __init__(self) -> None:
        super().__init__()
        self.claimed: list[str] = []

    def claim(self, key: str, *, is_prefetch: bool = False) -> Claim:
        claimed = super().claim(key, is_prefetch=is_prefetch)
        self.claimed.append(key)
        return claimed


@pytest.mark.parametrize("is_up", [False, True])
def test_many_threads_wait_for_one_fetch_and_all_hear_how_it_ended(is_up: bool) -> None:
    cache, may_end = CountedClaims(), threading.Event()
    fetches: list[str] = []

    def fetch() -> LoadedKernel:
        fetches.append(KEYS[4])
        assert may_end.wait(30)
        if not is_up:
            raise UnavailableError("away")
        return kernel(KEYS[4])

    def ask(_n: int) -> str:
        try:
            return cache.get_or_fetch(KEYS[4], fetch).kernel_sha256
        except UnavailableError as error:
            return str(error)

    with ThreadPoolExecutor(16) as threads:
        answers = [threads.submit(ask, n) for n in range(16)]
        wait_until(lambda: len(cache.claimed) == 16, what="all to wait")
        may_end.set()
        assert {a.result(30) for a in answers} == {KEYS[4] if is_up else "away"}
    assert len(fetches) == 1
    assert cache.stats.num_kernels == is_up


async def test_a_cancelled_leader_leaves_the_fetch_to_one_of_those_who_wait() -> None:
    cache, gate = KernelCache(), asyncio.Event()
    fetched_by: list[int] = []

    async def ask(n: int) -> str:
        found = cache.get(KEYS[4])
        while found is None:
            claim = cache.claim(KEYS[4])
            if not claim.leads:
                found = await asyncio.wrap_future(claim.future)
                continue
            with claim:
                fetched_by.append(n)
                await gate.wait()
                found = kernel(KEYS[4])
                claim.deliver(found)
        return found.kernel_sha256

    tasks = [asyncio.create_task(ask(n)) for n in range(5)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[3].cancel()
    while len(fetched_by) < 2:
        await asyncio.sleep(0)
    gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(a) for a in answers] == [asyncio.CancelledError, str, str, asyncio.CancelledError, str]
    assert fetched_by == [0, 1], "one fetch at a time, and one that ended"
    assert cache.stats.num_kernels == 1


def test_bytes_and_counts_are_exact_under_many_threads() -> None:
    cache, num_threads, num_lookups = KernelCache(CAPACITY_BYTES), 8, 3000

    def work(seed: int) -> None:
        draw = torch.randint(len(KEYS), (num_lookups,), generator=torch.Generator().manual_seed(seed)).tolist()
        for n, index in enumerate(draw):
            key = KEYS[index]
            found = cache.get_or_fetch(key, lambda k=key: kernel(k))
            if n % 7 == 0:
                cache.pin(found)
                assert cache.get(key) is not None
                cache.unpin(key)

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(work, range(num_threads)))
    stats = cache.stats
    assert stats.bytes == tensor_bytes(cache) <= CAPACITY_BYTES
    assert stats.pinned_bytes == 0
    assert stats.hits + stats.misses == num_threads * (num_lookups + -(-num_lookups // 7))
    assert not cache._flights


def test_what_comes_next_again_and_again_is_predicted_and_survives_the_process() -> None:
    cache = KernelCache(4000)
    a, b, c = KEYS[4:7]
    for _round in range(4):
        for key in (a, a, b, c):
            cache.get_or_fetch(key, lambda k=key: kernel(k))
    later = KernelCache(4000)
    later.learn_from(pickle.loads(pickle.dumps(cache.learnt())))
    assert [later.predictions(k) for k in (a, b, c)] == [(b,), (c,), (a,)]
    assert set(later.predictions()) == {a, b, c}
    later.pin(kernel(b))
    assert later.predictions(a) == (), "it is here"
    assert later.predictions(KEYS[9]) == (), "nobody asked for it so far"
    later.get_or_fetch(KEYS[9], lambda: kernel(KEYS[9]))
    later.learn_from(cache.learnt())
    assert next(reversed(later.learnt()["kernels"])) == KEYS[9], "what it knows itself stays"
    with pytest.raises(ContractError, match="no kernel access patterns"):
        later.learn_from({"format": "something else"})


def test_a_kernel_that_is_not_the_one_asked_for_is_refused_for_all() -> None:
    cache = KernelCache()
    with pytest.raises(ContractError, match="was delivered for"):
        cache.get_or_fetch(KEYS[1], lambda: kernel(KEYS[2]))
    assert cache.get_or_fetch(KEYS[1], lambda: kernel(KEYS[1])).kernel_sha256 == KEYS[1]


def test_habits_that_cannot_be_read_or_kept_are_left(tmp_path: Path) -> None:
    cache, path = KernelCache(CAPACITY_BYTES), tmp_path / "folder" / "habits.json"
    load_access_history(cache, path)
    cache.get_or_fetch(KEYS[4], lambda: kernel(KEYS[4]))
    save_access_history(cache, path)
    for broken in (b"", b"[]", b"{}", b'{"format": "esper-kernel-patterns-1", "kernels": {"a": 1}}', b"\xff"):
        other = KernelCache(CAPACITY_BYTES)
        (tmp_path / "broken.json").write_bytes(broken)
        load_access_history(other, path)
        load_access_history(other, tmp_path / "broken.json")
        assert other.predictions() == (KEYS[4],), "what was known before"
    (tmp_path / "a file").touch()
    save_access_history(cache, tmp_path / "a file" / "habits.json")
    assert [p.name for p in path.parent.iterdir()] == ["habits.json"]


def test_a_copied_cache_is_an_empty_one_of_its_size() -> None:
    cache = KernelCache(CAPACITY_BYTES)
    cache.pin(kernel(KEYS[4]))
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (other.capacity_bytes, other.stats.num_kernels) == (CAPACITY_BYTES, 0)


def test_long_use_leaves_nothing_behind() -> None:
    cache, generator = KernelCache(40 * CAPACITY_BYTES), torch.Generator().manual_seed(0)
    one = kernel(KEYS[5])

    def use(count: int) -> int:
        for n in torch.randint(5000, (count,), generator=generator).tolist():
            key = f"{n:064x}"
            found = cache.get_or_fetch(key, lambda k=key: LoadedKernel(k, "affine", SPEC, one.kind, 8, one.weights))
            if n % 16 == 0:
                cache.pin(found)
                cache.predictions(key)
                cache.unpin(key)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = use(6_000)
        assert use(12_000) - before < 100_000
    finally:
        tracemalloc.stop()
