"""Off-policy estimates on bandits whose truth is known: they hit it, their intervals cover it, and they know when to refuse."""

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from esper.services.tamiyo.evaluation.off_policy import (
    Comparison,
    EvaluationSettings,
    Interval,
    LoggedDecisions,
    TargetPolicy,
    compare,
    effective_sample_size,
    expanded_tail,
    weights_of,
)

KINDS = ("wait", "germinate affine", "germinate mlp", "cull")
BEHAVIOUR = np.array([0.55, 0.15, 0.15, 0.15])
TARGET = np.array([0.3, 0.1, 0.5, 0.1])
MEANS = np.array([0.0, 0.5, 1.0, -0.5])
CONTEXT = np.array([0.0, 0.2, -0.2, 0.1])  # what a context of +-1 adds to each action
TRUTH = float(TARGET @ MEANS)
EASY = EvaluationSettings(min_runs=2, min_ess=1.0, min_samples=1, num_draws=400)


class Bandit(NamedTuple):
    logged: LoggedDecisions
    target: TargetPolicy
    predicted_rewards: list[NDArray[np.float64]]


def bandit(
    seed: int, num_runs: int = 40, num_decisions: int = 15, measured: NDArray[np.float64] | None = None
) -> Bandit:
    """Runs of decisions: context +-1, an effect of the run that all its rewards share, noise.

    ``measured``: of each kind, the chance that its outcome is in the log at all.
    """
    rng = np.random.default_rng(seed)
    num = num_runs * num_decisions
    runs, contexts = np.repeat(np.arange(num_runs), num_decisions), rng.choice((-1.0, 1.0), num)
    chosen = rng.choice(len(KINDS), num, p=BEHAVIOUR)
    effect = rng.normal(0, 0.3, num_runs)[runs]
    rewards = MEANS[chosen] + CONTEXT[chosen] * contexts + effect + rng.normal(0, 0.5, num)
    kept = np.ones(num, bool) if measured is None else rng.random(num) < measured[chosen]
    (where,) = np.nonzero(kept)
    logged = LoggedDecisions(
        runs=[f"run{n}" for n in runs[where]],
        chosen=chosen[where].tolist(),
        behaviour=BEHAVIOUR[chosen[where]],
        rewards=rewards[where],
        kinds=[KINDS] * len(where),
        measured=None if measured is None else measured[chosen[where]],
    )
    predicted_rewards = [MEANS + 0.1 * c for c in contexts[where]]  # a model that is good, and not right
    return Bandit(logged, TargetPolicy.of("candidate", logged, [TARGET] * len(where)), predicted_rewards)


def judged(b: Bandit, evaluation_settings: EvaluationSettings = EASY) -> Any:
    return compare(b.logged, [b.target], evaluation_settings, b.predicted_rewards).judged["candidate"]


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("measured", [None, np.array([1.0, 0.4, 0.4, 0.7])], ids=["all measured", "some measured"])
def test_intervals_cover_the_truth_at_about_their_level(measured: NDArray[np.float64] | None) -> None:
    found = [judged(bandit(seed, measured=measured)) for seed in range(150)]
    for estimates in ([one.snips for one in found], [one.dr for one in found]):
        share = np.mean([covers(interval, TRUTH) for interval in estimates])
        # 150 trials at 0.95: a standard error of 0.018; a percentile interval of 40 runs covers a little less
        assert 0.88 <= share <= 0.995, share
        mean = np.mean([interval.value for interval in estimates])
        assert mean == pytest.approx(TRUTH, abs=0.02)
    assert np.std([one.dr.value for one in found]) < np.std([one.snips.value for one in found]) * 1.05


def test_without_the_chance_of_being_measured_an_estimate_is_wrong() -> None:
    measured = np.array([1.0, 0.2, 0.2, 0.2])
    values = []
    for seed in range(40):
        b = bandit(seed, measured=measured)
        blind = LoggedDecisions(b.logged.runs, b.logged.chosen, b.logged.behaviour, b.logged.rewards, b.logged.kinds)
        values.append((judged(b).snips.value, judged(b._replace(logged=blind)).snips.value))
    told, blindly = np.mean(values, axis=0)
    assert told == pytest.approx(TRUTH, abs=0.04)
    assert abs(blindly - TRUTH) > 0.1, "what is hardly measured would count for less than it was done"


def test_a_paired_difference_is_sharper_than_two_intervals_and_finds_the_better_one() -> None:
    b = bandit(1, num_runs=80)
    worse = TargetPolicy.of("worse", b.logged, [np.array([0.3, 0.2, 0.4, 0.1])] * len(b.logged))
    found = compare(b.logged, [b.target, worse], EASY, b.predicted_rewards, candidate="candidate")
    (difference,) = found.differences
    assert (difference.name, difference.than) == ("candidate", "worse")
    assert covers(difference.snips, 0.05)
    width = difference.snips.high - difference.snips.low
    assert width < 0.5 * (found.judged["worse"].snips.high - found.judged["worse"].snips.low)
    clearly = TargetPolicy.of("clearly", b.logged, [np.array([0.1, 0.1, 0.1, 0.7])] * len(b.logged))
    found = compare(b.logged, [b.target, clearly], EASY, b.predicted_rewards, candidate="candidate")
    assert found.differences[0].is_better
    other_way = compare(b.logged, [b.target, clearly], EASY, b.predicted_rewards, candidate="clearly")
    assert not other_way.differences[0].is_better


def test_two_policies_that_are_alike_are_not_found_better_more_often_than_the_level_says() -> None:
    better = 0
    for seed in range(100):
        b = bandit(seed)
        # worth the same: what it does more of one it does less of the other of equal mean
        alike = TargetPolicy.of("alike", b.logged, [TARGET + np.array([-0.1, 0.2, -0.1, 0.0])] * len(b.logged))
        assert float(np.array([-0.1, 0.2, -0.1, 0.0]) @ MEANS) == pytest.approx(0.0)
        better += compare(b.logged, [b.target, alike], EASY, b.predicted_rewards, "candidate").differences[0].is_better
    assert better <= 8, "2.5 of 100 are expected"


# it knows when to refuse


def test_without_overlap_it_refuses_and_says_why() -> None:
    b = bandit(0)
    never = [tuple(f"{kind} elsewhere" if kind == "cull" else kind for kind in KINDS)] * len(b.logged)
    logged = LoggedDecisions(b.logged.runs, [0] * len(b.logged), b.logged.behaviour, b.logged.rewards, never)
    target = TargetPolicy.of("candidate", logged, [np.array([0.0, 0.0, 0.0, 1.0])] * len(logged))
    found = compare(
        logged, [target, TargetPolicy("logged", logged.behaviour)], EvaluationSettings(), candidate="candidate"
    )
    verdict = found.judged["candidate"]
    assert not verdict.is_supported
    assert verdict.refusals == (
        "effective sample size 0.0, 50 are needed",
        "100 % of what it would do was tried less than 5 times, 10 % are allowed",
    )
    assert math.isnan(verdict.snips.value)
    assert not found.differences[0].is_better


def test_few_runs_and_few_effective_decisions_are_refused() -> None:
    b = bandit(0, num_runs=4, num_decisions=6)
    assert judged(b, EvaluationSettings()).refusals[0] == "4 runs, 10 are needed"
    assert "effective sample size" in judged(b, EvaluationSettings()).refusals[1]
    assert judged(bandit(0), EvaluationSettings()).is_supported


def test_nothing_at_all_is_refused() -> None:
    empty = LoggedDecisions([], [], np.zeros(0), np.zeros(0), [])
    found = compare(empty, [TargetPolicy.of("candidate", empty, [])], EvaluationSettings())
    assert (found.num_runs, found.judged["candidate"].is_supported) == (0, False)


@pytest.mark.parametrize(
    "broken",
    [
        {"behaviour": np.array([0.0])},
        {"behaviour": np.array([1.5])},
        {"rewards": np.array([math.inf])},
        {"chosen": [0, 1]},
        {"measured": np.array([0.0])},
        {"measured": np.array([1.0, 1.0])},
    ],
)
def test_a_log_that_cannot_be_is_refused(broken: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "runs": ["a"], "chosen": [0], "behaviour": np.array([0.5]), "rewards": np.array([0.0]), "kinds": [KINDS],
    }  # fmt: skip
    with pytest.raises(ValueError, match="must"):
        LoggedDecisions(**{**fields, **broken})


def test_probabilities_that_are_none_are_refused() -> None:
    logged = bandit(0, 2, 2).logged
    for row in ([0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0]):
        with pytest.raises(ValueError, match="candidate: every choice needs a probability"):
            TargetPolicy.of("candidate", logged, [np.array(row)] * len(logged))


# what must always hold


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), num_runs=st.integers(1, 6), num_decisions=st.integers(1, 8))
def test_the_policy_that_acted_has_weights_of_one_and_its_own_mean(
    seed: int, num_runs: int, num_decisions: int
) -> None:
    logged = bandit(seed, num_runs, num_decisions).logged
    itself = TargetPolicy.of("itself", logged, [BEHAVIOUR] * len(logged))
    assert weights_of(logged, itself).tolist() == [1.0] * len(logged)
    found = compare(logged, [itself], EASY).judged["itself"]
    assert found.snips.value == pytest.approx(float(logged.rewards.mean()))
    assert found.ess == pytest.approx(len(logged))
    assert found.max_weight == 1.0


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), order=st.randoms())
def test_the_order_of_decisions_and_the_names_of_runs_change_nothing(seed: int, order: Any) -> None:
    b = bandit(seed, 5, 6)
    rows = order.sample(range(len(b.logged)), len(b.logged))
    logged = LoggedDecisions(
        runs=[b.logged.runs[n] for n in rows],
        chosen=[b.logged.chosen[n] for n in rows],
        behaviour=b.logged.behaviour[rows],
        rewards=b.logged.rewards[rows],
        kinds=[b.logged.kinds[n] for n in rows],
    )
    target = TargetPolicy.of("candidate", logged, [TARGET] * len(logged))
    there, here = judged(b), judged(Bandit(logged, target, [b.predicted_rewards[n] for n in rows]))
    for one, other in ((there.snips, here.snips), (there.dr, here.dr)):
        assert (one.value, one.low, one.high) == pytest.approx(
            (other.value, other.low, other.high), rel=1e-9, abs=1e-12
        )
    assert here.ess == pytest.approx(there.ess)


@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_the_effective_sample_size_lies_between_none_and_all(weights: list[float]) -> None:
    ess = effective_sample_size(np.array(weights))
    assert 0.0 <= ess <= len(weights) * (1 + 1e-9)
    if len(set(weights)) == 1 and weights[0] > 1e-100:
        assert ess == pytest.approx(len(weights))


def test_a_perfect_model_leaves_no_variance_of_actions() -> None:
    b = bandit(2)
    exact = LoggedDecisions(
        b.logged.runs, b.logged.chosen, b.logged.behaviour, MEANS[list(b.logged.chosen)], b.logged.kinds
    )
    found: Comparison = compare(exact, [b.target], EASY, [MEANS] * len(exact))
    dr = found.judged["candidate"].dr
    assert dr is not None
    assert (dr.value, dr.low, dr.high) == pytest.approx((TRUTH,) * 3)


def test_the_expanded_tail_is_that_of_students_t() -> None:
    # quantiles of t at 0.975 as tables have them: 2.2622 with 9 degrees of freedom, 2.0227 with 39
    for num_runs, t in ((10, 2.2622), (40, 2.0227)):
        expected = NormalDist().cdf(-t * math.sqrt(num_runs / (num_runs - 1)))
        assert expanded_tail(0.95, num_runs) == pytest.approx(expected, rel=2e-3)
    assert expanded_tail(0.95, 10**9) == pytest.approx(0.025)
    assert expanded_tail(0.95, 1) == 0.0
