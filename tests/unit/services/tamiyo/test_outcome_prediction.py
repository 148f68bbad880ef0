"""Accuracy of predicted outcomes on held-out runs, compared with the class balance; the threshold is from training runs."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data.random_experiences import experiences, stored, strain, true_gain

from esper.graph.graph_view import GraphView
from esper.schemas.enums import Action
from esper.services.tamiyo.control.legal_choices import Choice, legal_choices
from esper.services.tamiyo.dataset.experiences import Experience, Experiences, StoredExperience
from esper.services.tamiyo.evaluation.outcome_prediction import (
    OutcomeAccuracy,
    PredictedOutcome,
    auc,
    best_threshold,
    outcome_accuracy,
    predict_outcomes,
    repeated_draws,
)
from esper.services.tamiyo.evaluation.policy_evaluation import RewardModel
from esper.services.tamiyo.evaluation.reward import NoiseFloor, noise_floor


def is_germination(one: Experience) -> bool:
    return legal_choices(one.view)[one.chosen].action is Action.GERMINATE


def of_runs(runs: range) -> Experiences:
    return Experiences([stored(one) for one in experiences(runs)])


TRAIN, HELD_OUT = of_runs(range(30)), of_runs(range(30, 45))
FLOOR: NoiseFloor = noise_floor([-0.004, 0.002, 0.003, -0.001, 0.001])


def oracle(views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /) -> list[list[float]]:
    """The true gain of every choice."""
    return [
        [true_gain(choice, strain(view, choice)) for choice in choices]
        for view, choices in zip(views, choices_per_view, strict=True)
    ]


def accuracy_of(held_out: Experiences, predict_rewards: RewardModel, floor: float) -> OutcomeAccuracy | None:
    trained = predict_outcomes(TRAIN, predict_rewards)
    return outcome_accuracy(
        best_threshold(trained.expected, trained.reward > floor), predict_outcomes(held_out, predict_rewards), floor
    )


def expects_no_gain(views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /) -> list[list[float]]:
    return [[0.0] * len(choices) for choices in choices_per_view]


def test_oracle_is_accurate_and_no_gain_equals_the_class_balance() -> None:
    well, badly = accuracy_of(HELD_OUT, oracle, FLOOR.high), accuracy_of(HELD_OUT, expects_no_gain, FLOOR.high)
    assert well is not None
    assert badly is not None
    assert 0 < well.num_helped < well.num
    assert well.accuracy > max(0.85, well.always_no)
    assert well.auc is not None
    assert well.auc > 0.9
    assert well.low < well.accuracy < well.high
    assert badly.auc == 0.5
    assert badly.correlation is None
    assert badly.accuracy in (pytest.approx(badly.always_no), pytest.approx(1 - badly.always_no))


def test_no_germination_gives_no_accuracy() -> None:
    assert accuracy_of(Experiences([]), oracle, FLOOR.high) is None


def test_repeated_draws_have_their_own_floor() -> None:
    drawn = Experiences(
        [
            replace(one, reward_variance=None if one.reward == 0.0 else 1e-8 * (1 + n % 2))
            for n, one in enumerate(HELD_OUT.stored)
        ]
    )
    several = repeated_draws(drawn)
    assert several is not None
    found = accuracy_of(several[0], oracle, several[1])
    assert found is not None
    assert found.floor == pytest.approx(1.96 * math.sqrt(1.5e-8), rel=0.02)
    assert 0 < found.num_helped < found.num
    assert found.num_helped > accuracy_of(HELD_OUT, oracle, FLOOR.high).num_helped  # a lower floor
    assert found.accuracy > found.always_no
    assert repeated_draws(Experiences([replace(one, reward_variance=None) for one in HELD_OUT.stored])) is None


def test_paired_floor_uses_germinations_without_placebos() -> None:
    growth = [one for one in HELD_OUT if is_germination(one)]
    nothing, placebo = growth[0].key, growth[1].key

    def variance(one: StoredExperience, is_growth: bool) -> float:
        return 0.0 if one.key in (nothing, placebo) else 1e-8 if is_growth else 1.0

    grown = {one.key for one in growth}
    drawn = [replace(one, reward_variance=variance(one, one.key in grown)) for one in HELD_OUT.stored]
    drawn = [
        replace(one, reward=0.0, is_placebo=one.key == placebo) if not one.reward_variance else one for one in drawn
    ]
    several = repeated_draws(Experiences(drawn))
    assert several is not None
    assert several[1] == pytest.approx(1.96e-4, rel=0.1)
    assert len(predict_outcomes(several[0], oracle).reward) == len(growth) - 1


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=30))
def test_best_threshold_has_the_fewest_errors(rows: list[tuple[int, bool]]) -> None:
    expected, helped = np.array([float(x) for x, _h in rows]), np.array([h for _x, h in rows])

    def errors(threshold: float) -> int:
        return int(((expected > threshold) != helped).sum())

    found = best_threshold(expected, helped)
    assert errors(found) == min(errors(t) for t in (*np.arange(-6, 6, 0.5), math.inf))


def test_auc_is_the_probability_of_correct_ranking() -> None:
    assert auc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False])) == 1.0
    assert auc(np.array([1.0, 2.0, 1.0]), np.array([True, False, False])) == 0.25
    assert auc(np.array([1.0]), np.array([True])) is None


def test_accuracy_interval_is_the_published_one() -> None:
    """81 of 263, Wilson's interval: Newcombe 1998, Statistics in Medicine 17, table I."""
    expected, reward = np.ones(263), np.repeat([1.0, -1.0], [81, 182])
    found = outcome_accuracy(0.5, PredictedOutcome(expected, reward), 0.0)
    assert found is not None
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
