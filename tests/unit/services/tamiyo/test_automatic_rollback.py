"""Automatic rollback: a harmful version is rolled back, and a harmless one stays however often it is tested."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events.event_examples import EXAMPLES

from esper.schemas.enums import Action
from esper.schemas.events import FieldReported
from esper.services.tamiyo.evaluation.automatic_rollback import harm_reason, mean_rewards
from esper.services.tamiyo.settings import RentSettings, RollbackSettings
from esper.streams.read_models.policy_versions import ForkedDecision

SETTINGS = RollbackSettings.model_validate({})
NO_RENT = RentSettings.model_validate({"parameters": 0, "flops": 0})


def is_ever_rolled_back(rng: random.Random, mean: float, num_runs: int) -> bool:
    rewards: list[float] = []
    for _run in range(num_runs):
        rewards.append(rng.gauss(mean, 0.03))
        if harm_reason(rewards, SETTINGS) is not None:
            return True
    return False


def test_harmless_version_is_rarely_rolled_back_over_all_tests() -> None:
    rng = random.Random(1)
    assert sum(is_ever_rolled_back(rng, 0.0, 80) for _n in range(400)) <= 0.05 * 400


def test_clearly_worse_version_is_rolled_back_soon() -> None:
    rng = random.Random(2)
    assert all(is_ever_rolled_back(rng, -0.03, 60) for _n in range(100))


@given(st.lists(st.floats(-1, 1), min_size=10, max_size=40), st.floats(0.001, 1))
def test_better_rewards_never_show_harm(rewards: list[float], more: float) -> None:
    if harm_reason(rewards, SETTINGS) is None:
        assert harm_reason([r + more for r in rewards], SETTINGS) is None
    if min(rewards) >= 0:
        assert harm_reason(rewards, SETTINGS) is None


@given(st.lists(st.floats(-1, -0.5), max_size=9))
def test_few_runs_show_no_harm(rewards: list[float]) -> None:
    assert harm_reason(rewards, SETTINGS) is None


def forked(run_id: str, gain: float, **fork: Any) -> ForkedDecision:
    example = next(e for e in EXAMPLES if isinstance(e, FieldReported))
    how = {"horizon_steps": 10, "num_draws": 1, "num_parameters_host": 10, "flops_added": 1, "flops_host": 10, **fork}
    fields = {
        **example.model_dump(),
        "run_id": run_id,
        "before": 0.5,
        "after": 0.5 + gain,
        "method": "fork",
        "fork": how,
    }
    return ForkedDecision(Action.GERMINATE, FieldReported.model_validate(fields))


def test_mean_rewards_count_runs_once_without_placebos() -> None:
    decided = [forked("a", 0.1), forked("a", 0.3), forked("b", -0.1), forked("c", 0.4, is_placebo=True)]
    assert mean_rewards(decided, NO_RENT) == pytest.approx([0.2, -0.1])
