"""Whether a policy foresees what helps: held-out germinations, each helped or not beyond a floor of noise.

An adaptation helped if its reward is above the floor: the placebos', or that of paired branches where forks were
drawn several times (docs/design/reward.md). A policy says so if the gain that it expects is above a threshold: the one that
errs least on the runs that it learnt from.
Placebos themselves are left out: that they do not help is known beforehand.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper.schemas.enums import Action
from esper.services.tamiyo.control.legal_choices import LegalChoices, legal_choices
from esper.services.tamiyo.dataset.experiences import Experience, Experiences
from esper.services.tamiyo.evaluation.policy_evaluation import BATCH_SIZE, RewardModel
from esper.services.tamiyo.evaluation.reward import MIN_DIFFERENCES, paired_floor

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OutcomeAccuracy:
    """How well outcomes are foreseen.

    Attributes:
        num, num_helped: held-out germinations, and those of them that helped beyond the floor: the class balance.
        accuracy: share that is foreseen right; ``low`` and ``high`` are its 95 % interval (Wilson 1927), which takes
            germinations of one run for independent.
        always_no: the accuracy of who says of none that it helps.
        auc: the chance that one that helped is expected to bring more than one that did not; None without both.
        correlation: of expected gain and reward (Pearson's); None where one of them does not vary.
        floor, threshold: in units of the reward; a threshold of None says of none that it helps.
    """

    num: int
    num_helped: int
    accuracy: float
    low: float
    high: float
    always_no: float
    auc: float | None
    correlation: float | None
    floor: float
    threshold: float | None


class PredictedOutcome(NamedTuple):
    """Of some germinations, (N,) each: the gain that was expected, the reward that it had."""

    expected: Floats
    reward: Floats


def outcome_accuracy(threshold: float, held_out: PredictedOutcome, floor: float) -> OutcomeAccuracy | None:
    """Judge what a policy expects on held-out runs; None where they have no germination that was measured.

    Args:
        threshold: above it a policy says that it helps; ``best_threshold`` of the runs that it learnt from.
        floor: a reward above it helped.
    """
    expected, reward = held_out
    if not len(reward):
        return None
    helped = reward > floor
    right = int(((expected > threshold) == helped).sum())
    low, high = wilson(right, len(helped))
    varies = len(reward) > 1 and expected.std() > 0 and reward.std() > 0
    return OutcomeAccuracy(
        num=len(helped),
        num_helped=int(helped.sum()),
        accuracy=right / len(helped),
        low=low,
        high=high,
        always_no=1.0 - float(helped.mean()),
        auc=auc(expected, helped),
        correlation=float(np.corrcoef(expected, reward)[0, 1]) if varies else None,
        floor=floor,
        threshold=None if math.isinf(threshold) else threshold,
    )


def repeated_draws(held_out: Experiences) -> tuple[Experiences, float] | None:
    """Those whose fork was drawn several times, and the floor of paired branches: of the variances of germinations.

    None where fewer than ``MIN_DIFFERENCES`` tell a variance.
    """
    drawn = Experiences(one for one in held_out.stored if one.reward_variance is not None)
    variances = [v for one in drawn if _is_growth(one, legal_choices(one.view)) and (v := one.reward_variance)]
    return (drawn, paired_floor(variances)) if len(variances) >= MIN_DIFFERENCES else None


def predict_outcomes(experiences: Experiences, predict_rewards: RewardModel) -> PredictedOutcome:
    """What a policy expects of every germination but placebos."""
    expected, found = list[float](), list[float]()
    for start in range(0, len(experiences), BATCH_SIZE):
        faced = [(one, legal_choices(one.view)) for one in experiences[start : start + BATCH_SIZE]]
        grown = [(one, choices) for one, choices in faced if _is_growth(one, choices)]
        predicted_rewards = (
            predict_rewards([one.view for one, _choices in grown], [choices for _one, choices in grown])
            if grown
            else ()
        )
        expected += [gains[one.chosen] for (one, _choices), gains in zip(grown, predicted_rewards, strict=True)]
        found += [one.reward for one, _choices in grown]
    return PredictedOutcome(np.array(expected), np.array(found))


def _is_growth(one: Experience, choices: LegalChoices) -> bool:
    """Whether it germinated something other than a placebo."""
    return not one.is_placebo and choices.at(one.chosen)[0] is Action.GERMINATE


def best_threshold(expected: Floats, helped: NDArray[np.bool_]) -> float:
    """Above which it is said to help: the one with the fewest errors; infinite where to say so of none is best."""
    order = np.argsort(-expected, kind="stable")
    ranked, gained = expected[order], np.cumsum(np.where(helped[order], 1, -1))
    below = np.append(ranked[1:], -math.inf)
    gained = np.where(below < ranked, gained, -1)  # no threshold lies between equal ones
    if not len(gained) or gained.max() <= 0:
        return math.inf
    last = int(gained.argmax())
    return float(ranked[last] - min(1.0, (ranked[last] - below[last]) / 2))


def auc(expected: Floats, helped: NDArray[np.bool_]) -> float | None:
    """The area under the ROC curve, by ranks (Mann and Whitney 1947); ties count half."""
    num_helped = int(helped.sum())
    if not 0 < num_helped < len(helped):
        return None
    above = expected[helped][:, None] - expected[~helped][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def wilson(num_right: int, num: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, wider = num_right / num, 1 + z * z / num
    middle = (share + z * z / (2 * num)) / wider
    reach = z / wider * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, middle - reach), min(1.0, middle + reach)
