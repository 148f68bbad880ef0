"""What a policy foresees: counted on held-out runs, beside the class balance, with a threshold from the runs it learnt from."""

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
    auc,
    best_threshold,
    outcome_accuracy,
    predict_outcomes,
    repeated_draws,
    wilson,
)
from esper.services.tamiyo.evaluation.policy_evaluation import RewardModel
from esper.services.tamiyo.evaluation.reward import NoiseFloor, noise_floor


def is_germination(one: Experience) -> bool:
    return legal_choices(one.view)[one.chosen].action is Action.GERMINATE


def of_runs(runs: range) -> Experiences:
    return Experiences([stored(one) for one in experiences(runs)])


TRAIN, HELD_OUT = of_runs(range(30)), of_runs(range(30, 45))
FLOOR: NoiseFloor = noise_floor([-0.004, 0.002, 0.003, -0.001, 0.001])


def knows(views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /) -> list[list[float]]:
    """What is true of every choice."""
    return [
        [true_gain(choice, strain(view, choice)) for choice in choices]
        for view, choices in zip(views, choices_per_view, strict=True)
    ]


def judged(held_out: Experiences, predict_rewards: RewardModel, floor: float) -> OutcomeAccuracy | None:
    learnt = predict_outcomes(TRAIN, predict_rewards)
    return outcome_accuracy(
        best_threshold(learnt.expected, learnt.reward > floor), predict_outcomes(held_out, predict_rewards), floor
    )


def expects_nothing(views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /) -> list[list[float]]:
    return [[0.0] * len(choices) for choices in choices_per_view]


def test_who_knows_foresees_and_who_expects_nothing_is_as_good_as_the_class_balance() -> None:
    well, badly = judged(HELD_OUT, knows, FLOOR.high), judged(HELD_OUT, expects_nothing, FLOOR.high)
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


def test_without_a_germination_nothing_is_said() -> None:
    assert judged(Experiences([]), knows, FLOOR.high) is None


def test_what_was_drawn_several_times_is_judged_by_its_own_noise() -> None:
    drawn = Experiences(
        [
            replace(one, reward_variance=None if one.reward == 0.0 else 1e-8 * (1 + n % 2))
            for n, one in enumerate(HELD_OUT.stored)
        ]
    )
    several = repeated_draws(drawn)
    assert several is not None
    found = judged(several[0], knows, several[1])
    assert found is not None
    assert found.floor == pytest.approx(1.96 * math.sqrt(1.5e-8), rel=0.02)
    assert 0 < found.num_helped < found.num
    assert found.num_helped > judged(HELD_OUT, knows, FLOOR.high).num_helped  # a lower floor
    assert found.accuracy > found.always_no
    assert repeated_draws(Experiences([replace(one, reward_variance=None) for one in HELD_OUT.stored])) is None


def test_the_paired_floor_is_of_germinations_alone_and_one_that_did_nothing_counts_where_a_placebo_does_not() -> None:
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
    assert len(predict_outcomes(several[0], knows).reward) == len(growth) - 1


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=30))
def test_no_other_threshold_errs_less(rows: list[tuple[int, bool]]) -> None:
    expected, helped = np.array([float(x) for x, _h in rows]), np.array([h for _x, h in rows])

    def errors(threshold: float) -> int:
        return int(((expected > threshold) != helped).sum())

    found = best_threshold(expected, helped)
    assert errors(found) == min(errors(t) for t in (*np.arange(-6, 6, 0.5), math.inf))


def test_the_area_is_the_chance_of_being_ranked_right() -> None:
    assert auc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False])) == 1.0
    assert auc(np.array([1.0, 2.0, 1.0]), np.array([True, False, False])) == 0.25
    assert auc(np.array([1.0]), np.array([True])) is None


def test_wilson_is_the_published_interval() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, Statistics in Medicine 17, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
