"""Activation, rollback, and the follower of the active version: a policy is always active, and only loaded ones are."""

import asyncio
import itertools
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.conditions import wait_until_async

from esper.errors import ConfigError, ConflictError, ContractError
from esper.schemas.enums import EvaluationVerdict
from esper.schemas.events import PolicyActivated, PolicyRolledBack
from esper.services.tamiyo.metrics import TamiyoMetrics
from esper.services.tamiyo.policies import EpsilonSoft, Policy
from esper.services.tamiyo.policies.active_policy import ActivePolicy
from esper.services.tamiyo.policies.baselines import SchedulePolicy, WaitPolicy
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.policies.policy_sources import BaselineSource, WeightsSource, configured_version
from esper.services.tamiyo.settings import TamiyoSettings
from esper.services.tamiyo.versions.activation import (
    FORCED,
    activation,
    announcement,
    find_version,
    refusal_reason,
    rollback,
    standing_activations,
)
from esper.services.tamiyo.versions.policy_follower import RETRY_S, PolicyFollower
from esper.streams.read_models.policy_versions import Evaluation, PolicyChange, PolicyVersion, TrainedVersion, Weights

DAY = datetime(2026, 1, 1, tzinfo=UTC)
BETTER, NOT_BETTER, TOO_THIN = EvaluationVerdict
TAMIYO = TamiyoSettings.model_validate({})


def version(policy_id: str, number: int, kind: str = "wait", **parameters: Any) -> PolicyVersion:
    return PolicyVersion(policy_id, number, kind, parameters)


def change(n: int, of: PolicyVersion, rolled_back_from: tuple[str, int] | None = None) -> PolicyChange:
    return PolicyChange(uuid.UUID(int=n), of, DAY + timedelta(hours=n), "test", False, rolled_back_from)


def evaluation(verdict: EvaluationVerdict, number: int = 2, against: int = 1) -> Evaluation:
    figures = (0.5, 0.2, 0.8, 0.95, 40.0, 200, ("run-1",))
    return Evaluation("gnn", number, "heuristic", against, "doubly_robust", *figures, verdict, "a reason", DAY)


ACTIVE = change(1, version("heuristic", 1, "heuristic"))
GNN = version("gnn", 2, "gnn")


@pytest.mark.parametrize(
    ("evaluations", "reason"),
    [
        ([], "gnn v2 was not evaluated against heuristic v1, which is active"),
        ([evaluation(BETTER, number=3)], "not evaluated"),
        ([evaluation(BETTER, against=2)], "not evaluated"),
        ([evaluation(BETTER), evaluation(NOT_BETTER)], "gnn v2 is not better than heuristic v1"),
        ([evaluation(BETTER), evaluation(TOO_THIN)], "cannot be compared with heuristic v1"),
        ([evaluation(NOT_BETTER), evaluation(BETTER)], None),
    ],
)
def test_only_a_version_evaluated_as_better_is_not_refused(evaluations: list[Evaluation], reason: str | None) -> None:
    refused = refusal_reason(GNN, ACTIVE, evaluations)
    if reason is None:
        assert refused is None
    else:
        assert refused is not None
        assert reason in refused


def test_refused_version_is_activated_only_by_force() -> None:
    with pytest.raises(ConflictError, match="--force"):
        activation(GNN, ACTIVE, "I like it", "test", refused="gnn v2 is not better")
    message = activation(GNN, ACTIVE, "I like it", "test", refused="gnn v2 is not better", is_forced=True)
    event = message.data
    assert isinstance(event, PolicyActivated)
    assert event.reason == "I like it (forced: gnn v2 is not better)"
    assert (event.parameters[FORCED], message.causation_id) == (True, ACTIVE.id)
    passed = activation(GNN, ACTIVE, "better", "test", is_forced=True).data
    assert isinstance(passed, PolicyActivated)
    assert (passed.reason, passed.parameters) == ("better", {}), "nothing was forced"


def test_activation_needs_a_reason_and_another_version() -> None:
    with pytest.raises(ConflictError, match="active already"):
        activation(ACTIVE.version, ACTIVE, "again", "test")
    with pytest.raises(ConfigError, match="--reason"):
        activation(GNN, ACTIVE, "  ", "test")


def test_find_version_by_training_activation_or_baseline() -> None:
    weights = Weights("ab" * 32, 5)
    trained = TrainedVersion(PolicyVersion("gnn", 2, "gnn", {"width": 8}, weights), 1, [], (None, None), 3, {}, "", DAY)
    assert find_version("gnn", 2, [trained], [], TAMIYO) == trained.version
    before = change(1, version("gnn", 1, "gnn", width=4, forced=True))
    assert find_version("gnn", 1, [trained], [before], TAMIYO).parameters == {"width": 4}
    assert find_version("schedule", 7, [], [], TAMIYO).parameters == {"every_epochs": 4, "epsilon": 0.05}
    with pytest.raises(ConfigError, match="gnn v3 does not exist; the trained versions of this policy: v1, v2"):
        find_version("gnn", 3, [trained], [before], TAMIYO)


@given(st.lists(st.integers(1, 4) | st.just("rollback"), max_size=30))
def test_rollback_follows_standing_activations(steps: list[int | str]) -> None:
    """Compared with a stack: an activation pushes a version, a rollback pops one."""
    changes: list[PolicyChange] = []
    stack: list[int] = []
    for n, step in enumerate(steps):
        if step == "rollback":
            if len(stack) < 2:
                with pytest.raises(ConflictError, match="nothing to roll back"):
                    rollback(changes, "test", "test")
                continue
            event = rollback(changes, "test", "test").data
            assert isinstance(event, PolicyRolledBack)
            assert event.policy_version == stack.pop()
            assert event.to_version == stack[-1]
            changes.insert(0, change(n, version("p", event.to_version), (event.policy_id, event.policy_version)))
        elif not stack or stack[-1] != step:
            stack.append(int(step))
            changes.insert(0, change(n, version("p", int(step))))
    assert [one.version.version for one in standing_activations(changes)] == stack


def test_controller_announces_itself_only_once() -> None:
    configured = configured_version(TAMIYO)
    for is_fixed in (True, False):
        first, again = (announcement(configured, [], "tamiyo", is_fixed=is_fixed) for _n in range(2))
        assert first is not None
        assert again is not None
        assert first.id == again.id, "controllers that start together write one event"
        assert isinstance(first.data, PolicyActivated)
        assert ("named_by" in first.data.parameters) == is_fixed
    assert announcement(configured, [ACTIVE], "tamiyo", is_fixed=True) is None
    assert announcement(configured, [change(2, GNN)], "tamiyo", is_fixed=False) is None
    other = announcement(version("heuristic", 2, "heuristic"), [ACTIVE], "tamiyo", is_fixed=True)
    assert other is not None


async def test_activation_parameters_override_settings() -> None:
    source = BaselineSource(TAMIYO)
    schedule = await source.load(version("schedule", 1, "schedule", every_epochs=9))
    heuristic = await source.load(version("heuristic", 1, "heuristic", patience=7, epsilon=0.5, unknown=1))
    assert isinstance(schedule, SchedulePolicy)
    assert isinstance(heuristic, HeuristicPolicy)
    assert vars(schedule) == {"_every": 9}
    assert (heuristic._t.patience, heuristic._t.min_gain) == (7, TAMIYO.heuristic.min_gain)
    with pytest.raises(ConfigError, match="no policy of kind 'gnn'"):
        await source.load(GNN)


async def test_version_without_weights_is_rejected_before_a_fetch() -> None:
    nothing: Any = None
    with pytest.raises(ContractError, match="gnn v2: the log has no training of it"):
        await WeightsSource(nothing, nothing).load(GNN)


class FakeWeightStore:
    """Loads policies when the test completes its futures."""

    def __init__(self) -> None:
        self.futures: dict[int, asyncio.Future[Policy]] = {}
        self.requested: list[int] = []

    async def load(self, version: PolicyVersion) -> Policy:
        self.requested.append(version.version)
        self.futures[version.version] = asyncio.get_running_loop().create_future()
        return await self.futures[version.version]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def follower_of(store: FakeWeightStore, clock: Clock) -> tuple[PolicyFollower, TamiyoMetrics]:
    metrics = TamiyoMetrics("wait", 1)
    metrics.poll_succeeded()

    def soften(policy: Policy) -> EpsilonSoft:
        return EpsilonSoft(policy, 0.05, 0)

    start = ActivePolicy(version("wait", 1), soften(WaitPolicy()))
    return PolicyFollower(start, {"gnn": store}, soften, metrics, clock), metrics


async def wait_for_loads(store: FakeWeightStore, *numbers: int) -> None:
    async def is_so() -> bool:
        return store.requested == list(numbers)

    await wait_until_async(is_so, 5, f"loads of {numbers}")


async def wait_for_load(follower: PolicyFollower) -> None:
    assert follower._loading is not None
    await asyncio.wait([follower._loading])


async def test_previous_policy_stays_active_until_the_next_is_loaded() -> None:
    store = FakeWeightStore()
    follower, metrics = follower_of(store, Clock())
    follower.update(change(1, GNN))
    await wait_for_loads(store, 2)
    follower.update(change(1, GNN))
    assert follower.active.version.policy_id == "wait"
    store.futures[2].set_result(WaitPolicy())
    await wait_for_load(follower)
    assert follower.active.version.policy_id == "wait", "the policy changes only in an update, between two batches"
    follower.update(change(1, GNN))
    assert follower.active.version == GNN
    follower.update(change(1, GNN))
    await wait_for_loads(store, 2)
    assert metrics.health.problems() == []


async def test_failed_load_is_reported_and_retried() -> None:
    store, clock = FakeWeightStore(), Clock()
    follower, metrics = follower_of(store, clock)
    follower.update(change(1, GNN))
    await wait_for_loads(store, 2)
    store.futures[2].set_exception(RuntimeError("no such tensor"))
    await wait_for_load(follower)
    follower.update(change(1, GNN))
    assert follower.active.version.policy_id == "wait"
    (problem,) = metrics.health.problems()
    assert "gnn v2" in problem.reason
    assert "no such tensor" in problem.reason
    assert "wait v1 still decides" in problem.reason
    follower.update(change(1, GNN))
    await wait_for_loads(store, 2)
    clock.now += RETRY_S[0]
    follower.update(change(1, GNN))
    await wait_for_loads(store, 2, 2)
    store.futures[2].set_result(WaitPolicy())
    await wait_for_load(follower)
    follower.update(change(1, GNN))
    assert follower.active.version == GNN
    assert metrics.health.problems() == []


async def test_change_rolled_back_during_its_load_never_decides() -> None:
    store = FakeWeightStore()
    follower, _metrics = follower_of(store, Clock())
    follower.update(change(1, GNN))
    await wait_for_loads(store, 2)
    follower.update(change(2, version("wait", 1), ("gnn", 2)))
    store.futures[2].cancel()
    follower.update(change(2, version("wait", 1), ("gnn", 2)))
    assert follower.active.version.policy_id == "wait"
    follower.update(change(3, version("gnn", 3, "gnn")))
    await wait_for_loads(store, 2, 3)
    await follower.aclose()


async def test_unknown_kind_is_reported_with_the_known_ones() -> None:
    follower, metrics = follower_of(FakeWeightStore(), Clock())
    await follower.start(change(1, version("tree", 1, "tree")))
    (problem,) = metrics.health.problems()
    assert "no source of kind 'tree': gnn" in problem.reason
    assert follower.active.version.policy_id == "wait"


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["load", "fail", "wait"])), max_size=20))
def test_active_policy_is_always_one_that_was_loaded(
    steps: Sequence[tuple[int, str]],
) -> None:
    async def follow() -> None:
        store, clock = FakeWeightStore(), Clock()
        follower, _metrics = follower_of(store, clock)
        loaded = {("wait", 1)}
        for n, (number, outcome) in zip(itertools.count(1), steps, strict=False):
            follower.update(change(n, version("gnn", number, "gnn")))
            clock.now += RETRY_S[1]
            for _turn in range(3):
                await asyncio.sleep(0)
            future = store.futures.get(number)
            if future is not None and not future.done() and outcome != "wait":
                future.set_result(WaitPolicy()) if outcome == "load" else future.set_exception(RuntimeError("x"))
                if outcome == "load":
                    loaded.add(("gnn", number))
                if follower._loading is not None:
                    await asyncio.wait([follower._loading])
            follower.update(change(n, version("gnn", number, "gnn")))
            assert (follower.active.version.policy_id, follower.active.version.version) in loaded
        await follower.aclose()

    asyncio.run(follow())
