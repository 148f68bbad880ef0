"""Prioritized replay against a plain implementation, and against the formulas of the paper."""

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.services.tamiyo.dataset.replay_buffer import MIN_ERROR, PrioritizedReplay, SumTree

WHOLE = st.integers(0, 2**20)  # floats add them exactly: a running sum is the tree's


@given(
    capacity=st.integers(1, 70),
    writes=st.lists(st.lists(st.tuples(st.integers(0, 69), WHOLE), max_size=20), max_size=6),
    points=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30),
)
def test_sum_tree_finds_what_a_running_sum_finds(
    capacity: int, writes: list[list[tuple[int, int]]], points: list[float]
) -> None:
    tree, plain = SumTree(capacity), np.zeros(capacity)
    for write in writes:
        tree.set([i % capacity for i, _v in write], [v for _i, v in write])
        for i, v in write:
            plain[i % capacity] = v
    assert tree.leaves.tolist() == plain.tolist()
    assert tree.total == plain.sum()
    if plain.sum() == 0:
        with pytest.raises(ValueError, match="nothing to find"):
            tree.find(points)
        return
    wanted = np.floor(np.array(points) * plain.sum())
    assert tree.find(wanted).tolist() == np.searchsorted(np.cumsum(plain), wanted, side="right").tolist()


@given(
    values=st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1e300)), min_size=1, max_size=40).filter(any),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
def test_sum_tree_never_finds_zero_however_sums_round(values: list[float], shares: list[float]) -> None:
    tree = SumTree(len(values))
    tree.set(range(len(values)), values)
    found = tree.find(np.array(shares) * tree.total)
    assert np.all(np.array(values)[found] > 0)


@given(
    first=st.lists(st.floats(0, 1e9), min_size=1, max_size=40), order=st.randoms(), noise=st.lists(st.floats(0, 1e9))
)
def test_sum_tree_depends_on_its_numbers_alone(first: list[float], order: Any, noise: list[float]) -> None:
    plain, other = SumTree(len(first)), SumTree(len(first))
    plain.set(range(len(first)), first)
    for value in noise:
        other.set(order.randrange(len(first)), value)
    for index in order.sample(range(len(first)), len(first)):
        other.set(index, first[index])
    assert other._nodes.tolist() == plain._nodes.tolist()


class Plain:
    """The same buffer without vectorization."""

    def __init__(self, capacity: int, alpha: float) -> None:
        self.capacity, self.alpha = capacity, alpha
        self.held: list[tuple[int, float]] = []
        self.slot, self.highest = 0, 1.0

    def add(self, items: list[int]) -> None:
        for item in items:
            if len(self.held) < self.capacity:
                self.held.append((item, self.highest))
            else:
                self.held[self.slot] = (item, self.highest)
            self.slot = (self.slot + 1) % self.capacity

    def update(self, slots: list[int], errors: list[float]) -> None:
        for slot, error in zip(slots, errors, strict=True):
            self.held[slot] = (self.held[slot][0], (abs(error) + MIN_ERROR) ** self.alpha)
        self.highest = max([self.highest, *((abs(e) + MIN_ERROR) ** self.alpha for e in errors)])


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 25)),
        st.tuples(st.just("draw"), st.integers(1, 12)),
    ),
    min_size=1,
    max_size=12,
)


@given(capacity=st.integers(1, 20), alpha=st.sampled_from((0.0, 0.6, 1.0)), acts=ACTS, seed=st.integers(0, 2**32))
def test_buffer_equals_the_plain_implementation(
    capacity: int, alpha: float, acts: list[tuple[str, int]], seed: int
) -> None:
    buffer = PrioritizedReplay(capacity, alpha=alpha, beta=0.5, num_annealed=50, rng_seed=seed)
    plain, rng, item, num_drawn = Plain(capacity, alpha), np.random.default_rng(seed), 0, 0
    for act, num in acts:
        if act == "add":
            items = list(range(item, item + num))
            item += num
            # of more items than its capacity the buffer keeps the last; the plain one overwrites one by one
            buffer.add(items)
            plain.add(items[-capacity:] if num > capacity else items)
        elif plain.held:
            beta = 0.5 + 0.5 * min(1.0, num_drawn / 50)
            assert buffer.beta == pytest.approx(beta)
            drawn = buffer.draw(num)
            num_drawn += num
            priorities = np.array([p for _i, p in plain.held])
            shares = priorities / priorities.sum()
            weights = (len(shares) * shares) ** -beta
            assert drawn.weights == pytest.approx((weights / weights.max())[drawn.slots])
            assert drawn.items.tolist() == [plain.held[s][0] for s in drawn.slots]
            errors = rng.normal(size=num)
            buffer.update(drawn.slots, errors)
            plain.update(drawn.slots.tolist(), errors.tolist())
        assert len(buffer) == len(plain.held)
        if plain.held:
            priorities = np.array([p for _i, p in plain.held])
            assert buffer.probabilities == pytest.approx(priorities / priorities.sum())


@given(seed=st.integers(0, 2**32), before=st.integers(0, 9), state_is_json=st.booleans())
def test_restored_buffer_continues_the_same_draws(seed: int, before: int, state_is_json: bool) -> None:
    def play(buffer: PrioritizedReplay, rounds: range) -> list[Any]:
        seen = []
        for n in rounds:
            buffer.add([100 + n])
            drawn = buffer.draw(5)
            buffer.update(drawn.slots, np.sin(drawn.items + n))
            seen.append([column.tolist() for column in drawn])
        return seen

    whole = PrioritizedReplay(8, num_annealed=30, rng_seed=seed)
    expected = play(whole, range(10))
    first = PrioritizedReplay(8, num_annealed=30, rng_seed=seed)
    seen = play(first, range(before))
    state = first.state_dict()
    if state_is_json:
        lists = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in state.items()}
        state = json.loads(json.dumps(lists))
    play(first, range(before, 10))  # later draws do not change the saved state
    second = PrioritizedReplay(8, num_annealed=30, rng_seed=seed + 1)
    second.load_state_dict(state)
    assert seen + play(second, range(before, 10)) == expected


def test_draws_follow_the_priorities() -> None:
    buffer = PrioritizedReplay(10, alpha=1.0, rng_seed=3)
    buffer.add(range(4))
    buffer.update(range(4), [0.1, 0.2, 0.3, 0.4])
    counts = np.bincount(np.concatenate([buffer.draw(100).items for _n in range(1_000)]), minlength=4)
    # 100,000 draws: a share's standard error is 0.0016 at most, and one draw from each part makes it smaller
    assert counts / counts.sum() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.005)


def test_full_buffer_is_fast_enough() -> None:
    buffer = PrioritizedReplay(100_000, rng_seed=0)
    buffer.add(range(100_000))
    began = time.perf_counter()
    for _n in range(20):
        drawn = buffer.draw(256)
        buffer.update(drawn.slots, drawn.weights)
    assert time.perf_counter() - began < 5, "a batch of 256 takes a millisecond or so"


def test_invalid_arguments_are_rejected() -> None:
    buffer = PrioritizedReplay(4)
    for broken in ({"alpha": -1.0}, {"beta": 1.5}, {"num_annealed": 0}, {"capacity": 0}):
        with pytest.raises(ValueError, match="must be"):
            PrioritizedReplay(**broken)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot draw 1 of 0"):
        buffer.draw(1)
    buffer.add([7, 8])
    with pytest.raises(ValueError, match="finite"):
        buffer.update([0], [float("nan")])
    with pytest.raises(IndexError, match=r"0\.\.1"):
        buffer.update([2], [1.0])
    with pytest.raises(ValueError, match="capacity 5"):
        buffer.load_state_dict(PrioritizedReplay(5).state_dict())
    with pytest.raises(IndexError):
        SumTree(3).set([3], [1.0])
    with pytest.raises(ValueError, match="at least 0"):
        SumTree(3).set([0], [-1.0])
