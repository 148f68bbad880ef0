"""Batches: many decided as each alone, one that breaks costs no other its choice, nobody waits for longer than allowed."""

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
    """Raises for some runs, gives nonsense for others; batches fail as a whole where one of the first is in them."""

    kind = "picky"

    def __init__(self, raising: set[str], nonsense: Mapping[str, ActionDistribution]) -> None:
        self._raising, self._nonsense = raising, nonsense

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        if view.run_id in self._raising:
            raise RuntimeError(f"cannot stand {view.run_id}")
        return self._nonsense.get(view.run_id) or point_mass(len(choices) - 1, f"the last of {len(choices)}")


NONSENSE = st.sampled_from(
    [
        ActionDistribution({0: NAN}, "x"), ActionDistribution({0: 0.4}, "x"), ActionDistribution({0: -0.5, 1: 1.5}, "x"), ActionDistribution({9: 1.0}, "x"),
        ActionDistribution({}, "x"), ActionDistribution({0: 1.0}, ""),
    ]
)  # fmt: skip


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    raising=st.sets(st.integers(0, 11), max_size=3),
    nonsense=st.dictionaries(st.integers(0, 11), NONSENSE, max_size=3),
    epsilon=st.floats(0.05, 1.0),
)
def test_a_batch_gives_each_view_what_it_gets_alone_and_wait_to_those_that_fail(
    sizes: list[int], raising: set[int], nonsense: dict[int, ActionDistribution], epsilon: float
) -> None:
    views = [view(n, size) for n, size in enumerate(sizes)]
    healthy = EpsilonSoft(Picky(set(), {}), epsilon, 7)
    acting = EpsilonSoft(Picky({f"r{n}" for n in raising}, {f"r{n}": f for n, f in nonsense.items()}), epsilon, 7)
    chosen = acting.choose_all(views)
    assert len(chosen) == len(views)
    for n, (one, alone) in enumerate(zip(chosen, map(healthy.choose, views), strict=True)):
        if n in raising | nonsense.keys():
            assert (one.choice.action, one.probability) == (Action.WAIT, 1.0)
            assert one.error is not None
            assert one.error in one.reason
        else:
            assert one == alone


def test_a_view_that_is_broken_itself_costs_no_other_its_choice() -> None:
    acting = EpsilonSoft(RandomPolicy(), 0.5, 0)
    broken, sound = acting.choose_all([view(0, 2, layer_of_seeds="no such layer"), view(1, 2)])
    assert (broken.choice.action, broken.error) == (Action.WAIT, "KeyError: 'no such layer'")
    assert sound == acting.choose(view(1, 2))


def test_a_reason_tells_what_epsilon_chose_from_what_the_policy_itself_left_to_chance() -> None:
    views = [view(n, 3) for n in range(300)]
    share = {0: 0.6, 1: 0.4}
    told = EpsilonSoft(
        Picky(set(), {v.run_id: ActionDistribution(share, "so it is") for v in views}), 0.1, 0
    ).choose_all(views)
    reasons = {
        "so it is",
        "exploration (epsilon 0.1); the policy said: so it is",
        "drawn at 38.5%; the policy said: so it is",
    }
    assert {one.reason for one in told} == reasons
    for one in told:
        assert ("exploration" in one.reason) == (one.probability == pytest.approx(0.1 / 4))


def test_a_policy_that_forgets_a_view_is_asked_one_by_one() -> None:
    class Forgetful(Picky):
        def distributions(
            self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]]
        ) -> list[ActionDistribution]:
            return [self.distribution(views[0], choices_per_view[0])]

    views = [view(0, 2), view(1, 3)]
    acting = EpsilonSoft(Forgetful(set(), {}), 0.05, 0)
    assert acting.choose_all(views) == [acting.choose(v) for v in views]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def numbered(n: int, *, is_complete: bool = True) -> PendingBoundary:
    return replace(ROW, run_id=f"r{n}", event_id=uuid.UUID(int=n), is_complete=is_complete)


@given(steps=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=40))
def test_a_broken_boundary_is_tried_less_and_less_and_given_up_in_time(steps: list[float]) -> None:
    clock = Clock()
    room = PendingBoundaryQueue(STALE_S, clock)
    tried = []
    for step in steps:
        for boundary in room.due(room.look([numbered(1)])).complete:
            tried.append(clock.now)
            if room.broke(boundary):
                assert clock.now - 100.0 >= STALE_S
                return
            assert clock.now - 100.0 < STALE_S
        clock.now += step
    assert len(tried) <= 7
    assert clock.now - 100.0 < STALE_S + steps[-1], "who waited for so long was due"


def test_who_is_incomplete_is_stale_after_a_while_and_who_is_decided_is_not_due() -> None:
    clock = Clock()
    room = PendingBoundaryQueue(STALE_S, clock)
    pending = [numbered(1), numbered(2, is_complete=False)]
    due = room.due(room.look(pending))
    assert (due.complete, due.stale) == ([pending[0]], [])
    assert room.decided(pending[0]) == 0.0
    clock.now += STALE_S
    due = room.due(room.look(pending))
    assert (due.complete, due.stale) == ([], [pending[1]])
    room.look([])
    assert room.look(pending) == pending, "what the projections stopped to show is forgotten"


def test_those_that_wait_for_longest_come_first() -> None:
    room = PendingBoundaryQueue(STALE_S, clock := Clock())
    room.look([numbered(9)])
    clock.now += 1
    assert [p.run_id for p in room.due(room.look([numbered(1), numbered(9)])).complete] == ["r9", "r1"]


def test_a_command_is_sent_again_only_when_it_had_time_to_arrive() -> None:
    clock = Clock()
    room = PendingBoundaryQueue(STALE_S, clock)
    undone = UncommandedDecision("r", 1, 1, 10, "cull", "fc1", 0, None, uuid.UUID(int=5), None, "ab" * 32, 0, 0)
    assert room.left_undone([undone]) == [], "whoever made it may be about to send it"
    clock.now += GRACE_S
    assert room.left_undone([undone]) == [undone]
    room.commanded(undone.event_id)
    assert room.left_undone([]) == room.left_undone([undone]) == []
    clock.now += RESEND_AFTER_S
    assert room.left_undone([undone]) == [undone]
    room.given_up(undone.event_id)
    clock.now += 1e6
    assert room.left_undone([undone]) == []


def test_a_policy_is_asked_once_for_a_batch() -> None:
    asked: list[int] = []

    class Counting(Picky):
        def distributions(
            self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]]
        ) -> Sequence[ActionDistribution]:
            asked.append(len(views))
            return super().distributions(views, choices_per_view)

    EpsilonSoft(Counting(set(), {}), 0.05, 0).choose_all([view(n, 2) for n in range(9)])
    assert asked == [9]


def test_weights_of_a_network_may_miss_one_by_what_float32_misses() -> None:
    near = ActionDistribution({0: 0.3333333, 1: 0.3333333, 2: 0.3333333}, "softmax")
    (chosen,) = EpsilonSoft(Picky(set(), {"r0": near}), 0.05, 0).choose_all([view(0, 2)])
    assert chosen.error is None
    assert chosen.probability == pytest.approx(1 / 3, abs=1e-3)


class Pool:
    """Gives connections that begin transactions, and nothing else."""

    def get_max_size(self) -> int:
        return 3

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator["Pool"]:
        yield self

    @asynccontextmanager
    async def transaction(self, **_options: Any) -> AsyncIterator[None]:
        yield


@given(broken=st.sets(st.integers(0, 29), max_size=4), num=st.integers(1, 30))
def test_rows_that_cannot_be_read_cost_no_other_run_its_view(broken: set[int], num: int) -> None:
    batch = [numbered(n) for n in range(num)]
    asked: list[int] = []

    async def read(_connection: Any, names: Sequence[tuple[str, int, int]]) -> list[Any]:
        asked.append(len(names))
        if any(int(run_id[1:]) in broken for run_id, _incarnation, _boundary in names):
            raise ValueError("no JSON")
        return [run_id for run_id, _incarnation, _boundary in names]

    nothing: Any = None
    decider = BatchDecider(Pool(), nothing, nothing, nothing, nothing, expiry_boundaries=1)
    with (
        patch.object(batch_decider, "read_many_view_rows", read),
        patch.object(batch_decider, "_assembled", lambda _p, row: row),
    ):
        views: list[Any] = asyncio.run(decider._read_views(batch))
    assert [n for n, found in enumerate(views) if isinstance(found, ValueError)] == sorted(b for b in broken if b < num)
    assert [found for n, found in enumerate(views) if n not in broken] == [
        f"r{n}" for n in range(num) if n not in broken
    ]
    if not broken:
        assert len(asked) <= 3


async def test_postgres_that_is_away_is_not_asked_for_each_run() -> None:
    asked: list[int] = []

    async def read(_connection: Any, names: Sequence[tuple[str, int, int]]) -> list[Any]:
        asked.append(len(names))
        raise ConnectionResetError("gone")

    nothing: Any = None
    decider = BatchDecider(Pool(), nothing, nothing, nothing, nothing, expiry_boundaries=1)
    with patch.object(batch_decider, "read_many_view_rows", read), pytest.raises(ConnectionResetError):
        await decider._read_views([numbered(n) for n in range(30)])
    assert asked == [10, 10, 10]
