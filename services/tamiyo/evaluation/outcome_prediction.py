"""How well a policy predicts which germinations help, on held-out runs.

An adaptation helped if its reward exceeds a noise floor: that of placebos, or that of paired branches if forks have
several draws (docs/design/reward.md). A policy predicts that it helps if the gain it expects exceeds a threshold: the
one with the fewest errors on the training runs. Placebos are left out: they never help, by definition.
"""

import math
from dataclasses import dataclass
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
    """How well outcomes are predicted. A policy's card has these fields.

    Attributes:
        num, num_helped: held-out germinations, and those that helped beyond the floor: the class balance.
        accuracy: share of correct predictions; ``low`` and ``high`` are its 95 % interval (Wilson 1927), which treats
            germinations of one run as independent.
        always_no: accuracy of predicting that no germination helps.
        auc: probability that a helpful germination is expected to gain more than another; None without both kinds.
        correlation: Pearson's, of expected gain and reward; None if one of them is constant.
        floor, threshold: in units of the reward; a threshold of None predicts that no germination helps.
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
    """Of each germination the expected gain and the reward, (N,) each."""

    expected: Floats
    reward: Floats


def outcome_accuracy(threshold: float, held_out: PredictedOutcome, floor: float) -> OutcomeAccuracy | None:
    """Compare predictions with rewards on held-out runs; None if these have no measured germination.

    Args:
        threshold: the expected gain above which a germination is predicted to help, from ``best_threshold``.
        floor: the reward above which a germination helped.
    """
    expected, reward = held_out
    if not len(reward):
        return None
    from scipy import stats  # imported here: it takes a second or more, and most commands do not need it

    helped = reward > floor
    num_correct = int(((expected > threshold) == helped).sum())
    interval = stats.binomtest(num_correct, len(helped)).proportion_ci(0.95, method="wilson")
    is_varied = len(reward) > 1 and expected.std() > 0 and reward.std() > 0
    return OutcomeAccuracy(
        num=len(helped),
        num_helped=int(helped.sum()),
        accuracy=num_correct / len(helped),
        low=float(interval.low),
        high=float(interval.high),
        always_no=1.0 - float(helped.mean()),
        auc=auc(expected, helped),
        correlation=float(np.corrcoef(expected, reward)[0, 1]) if is_varied else None,
        floor=floor,
        threshold=None if math.isinf(threshold) else threshold,
    )


def repeated_draws(held_out: Experiences) -> tuple[Experiences, float] | None:
    """Return the experiences whose fork has several draws, and the paired floor of their germinations.

    None if fewer than ``MIN_DIFFERENCES`` germinations have a variance.
    """
    drawn = Experiences(one for one in held_out.stored if one.reward_variance is not None)
    variances = [v for one in drawn if _is_growth(one, legal_choices(one.view)) and (v := one.reward_variance)]
    return (drawn, paired_floor(variances)) if len(variances) >= MIN_DIFFERENCES else None


def predict_outcomes(experiences: Experiences, predict_rewards: RewardModel) -> PredictedOutcome:
    """Predict the gain of every germination except placebos."""
    expected, rewards = list[float](), list[float]()
    for start in range(0, len(experiences), BATCH_SIZE):
        viewed = [(one, legal_choices(one.view)) for one in experiences[start : start + BATCH_SIZE]]
        grown = [(one, choices) for one, choices in viewed if _is_growth(one, choices)]
        if grown:
            predicted = predict_rewards([one.view for one, _choices in grown], [choices for _one, choices in grown])
            expected += [gains[one.chosen] for (one, _choices), gains in zip(grown, predicted, strict=True)]
            rewards += [one.reward for one, _choices in grown]
    return PredictedOutcome(np.array(expected), np.array(rewards))


def _is_growth(one: Experience, choices: LegalChoices) -> bool:
    return not one.is_placebo and choices.at(one.chosen)[0] is Action.GERMINATE


def best_threshold(expected: Floats, helped: NDArray[np.bool_]) -> float:
    """Return the threshold with the fewest errors; infinite if predicting that nothing helps has the fewest."""
    order = np.argsort(-expected, kind="stable")
    ranked, gained = expected[order], np.cumsum(np.where(helped[order], 1, -1))
    below = np.append(ranked[1:], -math.inf)
    gained = np.where(below < ranked, gained, -1)  # no threshold separates equal values
    if not len(gained) or gained.max() <= 0:
        return math.inf
    last = int(gained.argmax())
    return float(ranked[last] - min(1.0, (ranked[last] - below[last]) / 2))


def auc(expected: Floats, helped: NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve, by ranks (Mann and Whitney 1947); ties count half."""
    num_helped = int(helped.sum())
    if not 0 < num_helped < len(helped):
        return None
    from scipy import stats

    rank_sum = float(stats.rankdata(expected)[helped].sum())
    return (rank_sum - num_helped * (num_helped + 1) / 2) / (num_helped * (len(helped) - num_helped))
