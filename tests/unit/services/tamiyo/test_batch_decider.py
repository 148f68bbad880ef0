"""Batches: each view gets what it gets alone, a failing one affects no other, and no boundary waits too long."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.graph.graph_view import NO_HEALTH, GraphView, LayerView, SeedView
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.services.tamiyo.control import batch_decider
from esper.services.tamiyo.control.batch_decider import BatchDecider
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.control.pending_boundary_queue import GRACE_S, RESEND_AFTER_S, PendingBoundaryQueue
from esper.services.tamiyo.policies import ActionDistribution, EpsilonSoft, Policy, point_mass
from esper.services.tamiyo.policies.baselines import RandomPolicy
from esper.streams.read_models.pending_boundaries import PendingBoundary, UncommandedDecision

STALE_S = 5.0
ROW = PendingBoundary("r", 1, 1, 10, 0, uuid.UUID(int=1), None, datetime(2026, 1, 1, tzinfo=UTC), True)
NAN = float("nan")


def view(run: int, num_seeds: int, layer_of_seeds: str = "fc1") -> GraphView:
    layer = LayerView("fc1", LayerKind.LINEAR, 8, 72, num_seeds, NO_HEALTH, None)
    seeds = tuple(
        SeedView(layer_of_seeds, n, SeedStage.TRAINING, 0, None, 0, None, NO_HEALTH) for n in range(num_seeds)
    )
    return GraphView(f"r{run}", 1, 3, 30, 0, (layer,), (), seeds, (), ())


class Picky(Policy):
    """Raises for some runs and returns invalid distributions for others; one raising run fails the whole batch."""

    kind = "picky"

    def __init__(self, raising: set[str], invalid: Mapping[str, ActionDistribution]) -> None:
        self._raising, self._invalid = raising, invalid

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        if view.run_id in self._raising:
            raise RuntimeError(f"rejects {view.run_id}")
        return self._invalid.get(view.run_id) or point_mass(len(choices) - 1, f"the last of {len(choices)}")


INVALID = st.sampled_from(
    [
        ActionDistribution({0: NAN}, "x"), ActionDistribution({0: 0.4}, "x"), ActionDistribution({0: -0.5, 1: 1.5}, "x"), ActionDistribution({9: 1.0}, "x"),
        ActionDistribution({}, "x"), ActionDistribution({0: 1.0}, ""),
    ]
)  # fmt: skip


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    raising=st.sets(st.integers(0, 11), max_size=3),
    invalid=st.dictionaries(st.integers(0, 11), INVALID, max_size=3),
    epsilon=st.floats(0.05, 1.0),
)
def test_batch_equals_single_views_and_failures_get_wait(
    sizes: list[int], raising: set[int], invalid: dict[int, ActionDistribution], epsilon: float
) -> None:
    views = [view(n, size) for n, size in enumerate(sizes)]
    healthy = EpsilonSoft(Picky(set(), {}), epsilon, 7)
    soft_policy = EpsilonSoft(Picky({f"r{n}" for n in raising}, {f"r{n}": f for n, f in invalid.items()}), epsilon, 7)
    chosen = soft_policy.choose_all(views)
    assert len(chosen) == len(views)
    for n, (one, alone) in enumerate(zip(chosen, map(healthy.choose, views), strict=True)):
        if n in raising | invalid.keys():
            assert (one.choice.action, one.probability) == (Action.WAIT, 1.0)
            assert one.error is not None
            assert one.error in one.reason
        else:
            assert one == alone


def test_broken_view_does_not_affect_others() -> None:
    soft_policy = EpsilonSoft(RandomPolicy(), 0.5, 0)
    broken, sound = soft_policy.choose_all([view(0, 2, layer_of_seeds="no such layer"), view(1, 2)])
    assert (broken.choice.action, broken.error) == (Action.WAIT, "KeyError: 'no such layer'")
    assert sound == soft_policy.choose(view(1, 2))


def test_reason_distinguishes_exploration_from_sampling() -> None:
    views = [view(n, 3) for n in range(300)]
    share = {0: 0.6, 1: 0.4}
    sampled = EpsilonSoft(
        Picky(set(), {v.run_id: ActionDistribution(share, "a reason") for v in views}), 0.1, 0
    ).choose_all(views)
    reasons = {
        "a reason",
        "exploration (epsilon 0.1); preferred: wait, because a reason",
        "sampled at 38.5%; preferred: wait, because a reason",
    }
    assert {one.reason for one in sampled} == reasons
    for one in sampled:
        assert ("exploration" in one.reason) == (one.probability == pytest.approx(0.1 / 4))


def test_wrong_number_of_distributions_decides_views_singly() -> None:
    class Incomplete(Picky):
        def distributions(
            self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]]
        ) -> list[ActionDistribution]:
            return [self.distribution(views[0], choices_per_view[0])]

    views = [view(0, 2), view(1, 3)]
    soft_policy = EpsilonSoft(Incomplete(set(), {}), 0.05, 0)
    assert soft_policy.choose_all(views) == [soft_policy.choose(v) for v in views]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def numbered(n: int, *, is_complete: bool = True) -> PendingBoundary:
    return replace(ROW, run_id=f"r{n}", event_id=uuid.UUID(int=n), is_complete=is_complete)


@given(steps=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=40))
def test_failing_view_is_retried_with_backoff_then_abandoned(steps: list[float]) -> None:
    clock = Clock()
    queue = PendingBoundaryQueue(STALE_S, clock)
    tried = []
    for step in steps:
        for boundary in queue.ready(queue.update([numbered(1)])).complete:
            tried.append(clock.now)
            if queue.view_failed(boundary):
                assert clock.now - 100.0 >= STALE_S
                return
            assert clock.now - 100.0 < STALE_S
        clock.now += step
    assert len(tried) <= 7
    assert clock.now - 100.0 < STALE_S + steps[-1], "a boundary that waited so long was ready"


def test_incomplete_boundary_becomes_stale() -> None:
    clock = Clock()
    queue = PendingBoundaryQueue(STALE_S, clock)
    pending = [numbered(1), numbered(2, is_complete=False)]
    ready = queue.ready(queue.update(pending))
    assert (ready.complete, ready.stale) == ([pending[0]], [])
    assert queue.mark_decided(pending[0]) == 0.0
    clock.now += STALE_S
    ready = queue.ready(queue.update(pending))
    assert (ready.complete, ready.stale) == ([], [pending[1]])
    queue.update([])
    assert queue.update(pending) == pending, "state is dropped with the row in the projections"


def test_ready_boundaries_are_ordered_by_waiting_time() -> None:
    queue = PendingBoundaryQueue(STALE_S, clock := Clock())
    queue.update([numbered(9)])
    clock.now += 1
    assert [p.run_id for p in queue.ready(queue.update([numbered(1), numbered(9)])).complete] == ["r9", "r1"]


def test_command_is_resent_only_after_time_to_arrive() -> None:
    clock = Clock()
    queue = PendingBoundaryQueue(STALE_S, clock)
    decision = UncommandedDecision("r", 1, 1, 10, "cull", "fc1", 0, None, uuid.UUID(int=5), None, "ab" * 32, 0, 0)
    assert queue.due_commands([decision]) == [], "the controller that made it may be about to send the command"
    clock.now += GRACE_S
    assert queue.due_commands([decision]) == [decision]
    queue.mark_commanded(decision.event_id)
    assert queue.due_commands([]) == queue.due_commands([decision]) == []
    clock.now += RESEND_AFTER_S
    assert queue.due_commands([decision]) == [decision]
    queue.abandon_command(decision.event_id)
    clock.now += 1e6
    assert queue.due_commands([decision]) == []


def test_policy_is_called_once_per_batch() -> None:
    batch_sizes: list[int] = []

    class Counting(Picky):
        def distributions(
            self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]]
        ) -> Sequence[ActionDistribution]:
            batch_sizes.append(len(views))
            return super().distributions(views, choices_per_view)

    EpsilonSoft(Counting(set(), {}), 0.05, 0).choose_all([view(n, 2) for n in range(9)])
    assert batch_sizes == [9]


def test_float32_rounding_of_probabilities_is_accepted() -> None:
    near = ActionDistribution({0: 0.3333333, 1: 0.3333333, 2: 0.3333333}, "softmax")
    (chosen,) = EpsilonSoft(Picky(set(), {"r0": near}), 0.05, 0).choose_all([view(0, 2)])
    assert chosen.error is None
    assert chosen.probability == pytest.approx(1 / 3, abs=1e-3)


class Pool:
    """A pool whose connections only begin transactions."""

    def get_max_size(self) -> int:
        return 3

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator["Pool"]:
        yield self

    @asynccontextmanager
    async def transaction(self, **_options: Any) -> AsyncIterator[None]:
        yield


@given(broken=st.sets(st.integers(0, 29), max_size=4), num=st.integers(1, 30))
def test_unreadable_rows_do_not_affect_other_runs(broken: set[int], num: int) -> None:
    batch = [numbered(n) for n in range(num)]
    batch_sizes: list[int] = []

    async def read(_connection: Any, names: Sequence[tuple[str, int, int]]) -> list[Any]:
        batch_sizes.append(len(names))
        if any(int(run_id[1:]) in broken for run_id, _incarnation, _boundary in names):
            raise ValueError("no JSON")
        return [run_id for run_id, _incarnation, _boundary in names]

    nothing: Any = None
    decider = BatchDecider(Pool(), nothing, nothing, nothing, nothing, expiry_boundaries=1)
    with (
        patch.object(batch_decider, "read_many_view_rows", read),
        patch.object(batch_decider, "_assemble", lambda _p, row: row),
    ):
        views: list[Any] = asyncio.run(decider._read_views(batch))
    assert [n for n, found in enumerate(views) if isinstance(found, ValueError)] == sorted(b for b in broken if b < num)
    assert [found for n, found in enumerate(views) if n not in broken] == [
        f"r{n}" for n in range(num) if n not in broken
    ]
    if not broken:
        assert len(batch_sizes) <= 3


async def test_lost_connection_is_not_retried_for_each_run() -> None:
    batch_sizes: list[int] = []

    async def read(_connection: Any, names: Sequence[tuple[str, int, int]]) -> list[Any]:
        batch_sizes.append(len(names))
        raise ConnectionResetError("gone")

    nothing: Any = None
    decider = BatchDecider(Pool(), nothing, nothing, nothing, nothing, expiry_boundaries=1)
    with patch.object(batch_decider, "read_many_view_rows", read), pytest.raises(ConnectionResetError):
        await decider._read_views([numbered(n) for n in range(30)])
    assert batch_sizes == [10, 10, 10]
