"""Off-policy estimates on bandits with a known truth: bias, coverage of intervals, and refusals."""

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
CONTEXT = np.array([0.0, 0.2, -0.2, 0.1])  # effect of a context of +-1 on each action
TRUTH = float(TARGET @ MEANS)
EASY = EvaluationSettings(min_runs=2, min_ess=1.0, min_samples=1, num_draws=400)


class Bandit(NamedTuple):
    logged: LoggedDecisions
    target: TargetPolicy
    predicted_rewards: list[NDArray[np.float64]]


def bandit(
    seed: int, num_runs: int = 40, num_decisions: int = 15, measured: NDArray[np.float64] | None = None
) -> Bandit:
    """Runs of decisions with a context of +-1, a random effect of the run on all its rewards, and noise.

    Args:
        measured: for each kind the probability that its outcome is in the log.
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
    predicted_rewards = [MEANS + 0.1 * c for c in contexts[where]]  # a model that is good but biased
    return Bandit(logged, TargetPolicy.of("candidate", logged, [TARGET] * len(where)), predicted_rewards)


def estimate(b: Bandit, evaluation_settings: EvaluationSettings = EASY) -> Any:
    return compare(b.logged, [b.target], evaluation_settings, b.predicted_rewards).estimates["candidate"]


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("measured", [None, np.array([1.0, 0.4, 0.4, 0.7])], ids=["all measured", "some measured"])
def test_intervals_cover_the_truth_at_their_level(measured: NDArray[np.float64] | None) -> None:
    found = [estimate(bandit(seed, measured=measured)) for seed in range(150)]
    for estimates in ([one.snips for one in found], [one.dr for one in found]):
        share = np.mean([covers(interval, TRUTH) for interval in estimates])
        # 150 trials at 0.95: a standard error of 0.018; a percentile interval of 40 runs covers a little less
        assert 0.88 <= share <= 0.995, share
        mean = np.mean([interval.value for interval in estimates])
        assert mean == pytest.approx(TRUTH, abs=0.02)
    assert np.std([one.dr.value for one in found]) < np.std([one.snips.value for one in found]) * 1.05


def test_ignoring_measurement_probability_biases_estimates() -> None:
    measured = np.array([1.0, 0.2, 0.2, 0.2])
    values = []
    for seed in range(40):
        b = bandit(seed, measured=measured)
        unweighted = LoggedDecisions(
            b.logged.runs, b.logged.chosen, b.logged.behaviour, b.logged.rewards, b.logged.kinds
        )
        values.append((estimate(b).snips.value, estimate(b._replace(logged=unweighted)).snips.value))
    weighted, unweighted = np.mean(values, axis=0)
    assert weighted == pytest.approx(TRUTH, abs=0.04)
    assert abs(unweighted - TRUTH) > 0.1, "choices that are rarely measured would count too little"


def test_paired_difference_is_narrower_and_finds_the_better() -> None:
    b = bandit(1, num_runs=80)
    worse = TargetPolicy.of("worse", b.logged, [np.array([0.3, 0.2, 0.4, 0.1])] * len(b.logged))
    found = compare(b.logged, [b.target, worse], EASY, b.predicted_rewards, candidate="candidate")
    (difference,) = found.differences
    assert (difference.name, difference.than) == ("candidate", "worse")
    assert covers(difference.snips, 0.05)
    width = difference.snips.high - difference.snips.low
    assert width < 0.5 * (found.estimates["worse"].snips.high - found.estimates["worse"].snips.low)
    clearly = TargetPolicy.of("clearly", b.logged, [np.array([0.1, 0.1, 0.1, 0.7])] * len(b.logged))
    found = compare(b.logged, [b.target, clearly], EASY, b.predicted_rewards, candidate="candidate")
    assert found.differences[0].is_better
    other_way = compare(b.logged, [b.target, clearly], EASY, b.predicted_rewards, candidate="clearly")
    assert not other_way.differences[0].is_better


def test_equal_policies_are_rarely_found_better() -> None:
    better = 0
    for seed in range(100):
        b = bandit(seed)
        # the same value: probability moves between choices whose means cancel
        alike = TargetPolicy.of("alike", b.logged, [TARGET + np.array([-0.1, 0.2, -0.1, 0.0])] * len(b.logged))
        assert float(np.array([-0.1, 0.2, -0.1, 0.0]) @ MEANS) == pytest.approx(0.0)
        better += compare(b.logged, [b.target, alike], EASY, b.predicted_rewards, "candidate").differences[0].is_better
    assert better <= 8, "2.5 of 100 are expected"


# refusals


def test_missing_overlap_is_refused_with_the_reason() -> None:
    b = bandit(0)
    never = [tuple(f"{kind} elsewhere" if kind == "cull" else kind for kind in KINDS)] * len(b.logged)
    logged = LoggedDecisions(b.logged.runs, [0] * len(b.logged), b.logged.behaviour, b.logged.rewards, never)
    target = TargetPolicy.of("candidate", logged, [np.array([0.0, 0.0, 0.0, 1.0])] * len(logged))
    found = compare(
        logged, [target, TargetPolicy("logged", logged.behaviour)], EvaluationSettings(), candidate="candidate"
    )
    estimated = found.estimates["candidate"]
    assert not estimated.is_supported
    assert estimated.refusals == (
        "effective sample size 0.0, 50 are needed",
        "100 % of its choices are of kinds with fewer than 5 samples, 10 % are allowed",
    )
    assert math.isnan(estimated.snips.value)
    assert not found.differences[0].is_better


def test_few_runs_and_small_effective_sample_are_refused() -> None:
    b = bandit(0, num_runs=4, num_decisions=6)
    assert estimate(b, EvaluationSettings()).refusals[0] == "4 runs, 10 are needed"
    assert "effective sample size" in estimate(b, EvaluationSettings()).refusals[1]
    assert estimate(bandit(0), EvaluationSettings()).is_supported


def test_empty_log_is_refused() -> None:
    empty = LoggedDecisions([], [], np.zeros(0), np.zeros(0), [])
    found = compare(empty, [TargetPolicy.of("candidate", empty, [])], EvaluationSettings())
    assert (found.num_runs, found.estimates["candidate"].is_supported) == (0, False)


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
def test_invalid_log_is_rejected(broken: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "runs": ["a"], "chosen": [0], "behaviour": np.array([0.5]), "rewards": np.array([0.0]), "kinds": [KINDS],
    }  # fmt: skip
    with pytest.raises(ValueError, match="must"):
        LoggedDecisions(**{**fields, **broken})


def test_invalid_probabilities_are_rejected() -> None:
    logged = bandit(0, 2, 2).logged
    for row in ([0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0]):
        with pytest.raises(ValueError, match="candidate: every choice needs a probability"):
            TargetPolicy.of("candidate", logged, [np.array(row)] * len(logged))


# invariants


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), num_runs=st.integers(1, 6), num_decisions=st.integers(1, 8))
def test_behaviour_policy_has_weights_of_one_and_its_mean(seed: int, num_runs: int, num_decisions: int) -> None:
    logged = bandit(seed, num_runs, num_decisions).logged
    itself = TargetPolicy.of("itself", logged, [BEHAVIOUR] * len(logged))
    assert weights_of(logged, itself).tolist() == [1.0] * len(logged)
    found = compare(logged, [itself], EASY).estimates["itself"]
    assert found.snips.value == pytest.approx(float(logged.rewards.mean()))
    assert found.ess == pytest.approx(len(logged))
    assert found.max_weight == 1.0


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), order=st.randoms())
def test_order_of_decisions_does_not_change_estimates(seed: int, order: Any) -> None:
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
    there, here = estimate(b), estimate(Bandit(logged, target, [b.predicted_rewards[n] for n in rows]))
    for one, other in ((there.snips, here.snips), (there.dr, here.dr)):
        assert (one.value, one.low, one.high) == pytest.approx(
            (other.value, other.low, other.high), rel=1e-9, abs=1e-12
        )
    assert here.ess == pytest.approx(there.ess)


@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_effective_sample_size_is_at_most_the_sample_size(weights: list[float]) -> None:
    ess = effective_sample_size(np.array(weights))
    assert 0.0 <= ess <= len(weights) * (1 + 1e-9)
    if len(set(weights)) == 1 and weights[0] > 1e-100:
        assert ess == pytest.approx(len(weights))


def test_exact_reward_model_leaves_no_variance() -> None:
    b = bandit(2)
    exact = LoggedDecisions(
        b.logged.runs, b.logged.chosen, b.logged.behaviour, MEANS[list(b.logged.chosen)], b.logged.kinds
    )
    found: Comparison = compare(exact, [b.target], EASY, [MEANS] * len(exact))
    dr = found.estimates["candidate"].dr
    assert dr is not None
    assert (dr.value, dr.low, dr.high) == pytest.approx((TRUTH,) * 3)


def test_expanded_tail_uses_students_t() -> None:
    # quantiles of t at 0.975 as tables have them: 2.2622 with 9 degrees of freedom, 2.0227 with 39
    for num_runs, t in ((10, 2.2622), (40, 2.0227)):
        expected = NormalDist().cdf(-t * math.sqrt(num_runs / (num_runs - 1)))
        assert expanded_tail(0.95, num_runs) == pytest.approx(expected, rel=2e-3)
    assert expanded_tail(0.95, 10**9) == pytest.approx(0.025)
    assert expanded_tail(0.95, 1) == 0.0
