"""Evaluates policies on experiences with the estimators of ``esper.services.tamiyo.evaluation.off_policy``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from esper.graph.graph_view import GraphView
from esper.services.tamiyo.control.legal_choices import Choice, legal_choices
from esper.services.tamiyo.dataset.experiences import Experience, Experiences
from esper.services.tamiyo.evaluation.off_policy import (
    Comparison,
    Difference,
    EvaluationSettings,
    Floats,
    LoggedDecisions,
    TargetPolicy,
    compare,
)
from esper.services.tamiyo.policies import EpsilonSoft, Policy
from esper.services.tamiyo.policies.baselines import RandomPolicy, SchedulePolicy, WaitPolicy
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.settings import TamiyoSettings

AS_LOGGED = "as logged"
"""The name of the behaviour policies, whose decisions are in the log."""

BATCH_SIZE = 256
"""Views that are unpacked at the same time, and given to a policy in one call."""

Measured = Mapping[str, tuple[int, int]]
"""Action -> decisions with a measured outcome, and decisions that could have one (``ExperienceJoin.measured``)."""


class RewardModel(Protocol):
    """A model of the reward, for doubly robust estimates. Fit it on other runs than those it is evaluated on."""

    def __call__(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[Sequence[float]]:
        """Return the expected reward of each choice of each view, in units of the metric."""
        ...


def baselines(tamiyo: TamiyoSettings) -> dict[str, Policy]:
    """Return the policies that a learned one must beat, with the thresholds of the settings."""
    policies: tuple[Policy, ...] = (
        WaitPolicy(),
        RandomPolicy(),
        SchedulePolicy(tamiyo.schedule_every_epochs),
        HeuristicPolicy(tamiyo.heuristic),
    )
    return {policy.kind: policy for policy in policies}


def evaluate(
    experiences: Experiences,
    policies: Mapping[str, Policy],
    *,
    epsilon: float,
    measured: Measured,
    settings: EvaluationSettings | None = None,
    candidate: str | None = None,
    reward_model: RewardModel | None = None,
    on_progress: Callable[[int], None] = lambda _num: None,
) -> Comparison:
    """Evaluate policies, each made epsilon-soft, and the behaviour policy on the same held-out experiences.

    Args:
        measured: the share of outcomes that are in the log; 1 for an action that is not in it.
        candidate: the policy to compare with each of the others.
        reward_model: adds doubly robust estimates.
        on_progress: is called with the number of experiences that are done.
    """
    columns = _Columns(policies, epsilon, measured, reward_model)
    for start in range(0, len(experiences), BATCH_SIZE):
        batch = list(experiences[start : start + BATCH_SIZE])
        columns.add(batch)
        on_progress(start + len(batch))
    logged = columns.logged(experiences)
    targets = [TargetPolicy(AS_LOGGED, logged.behaviour)]
    targets += [TargetPolicy.of(name, logged, rows) for name, rows in columns.probabilities.items()]
    predicted = columns.predicted_rewards if reward_model else None
    return compare(logged, targets, settings or EvaluationSettings(), predicted, candidate)


def verdict_of(
    comparison: Comparison, difference: Difference, held_out_runs: Sequence[str], level: float
) -> dict[str, Any]:
    """Return the fields of ``PolicyEvaluated`` for one difference, without names and versions of the policies.

    Of SNIPS and doubly robust it takes the one with the lower bound that is lower: the conservative one.
    """
    estimates = [comparison.estimates[name] for name in (difference.name, difference.than)]
    refusals = [f"{one.name}: {refusal}" for one in estimates for refusal in one.refusals]
    intervals = {"snips": difference.snips, "dr": difference.dr}
    estimator, interval = min(((n, i) for n, i in intervals.items() if i is not None), key=lambda e: e[1].low)
    verdict = "too_thin" if refusals else "better" if difference.is_better else "not_better"
    numbers = {"estimate": interval.value, "low": interval.low, "high": interval.high}
    return {
        "estimator": estimator,
        **(numbers if difference.is_supported else dict.fromkeys(numbers)),
        "confidence": level,
        "effective_sample_size": estimates[0].ess,
        "num_decisions": comparison.num_decisions,
        "held_out_runs": list(held_out_runs),
        "verdict": verdict,
        "reason": "; ".join(refusals)
        or f"{estimator} {interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})",
    }


class _Columns:
    """The columns of ``LoggedDecisions`` and ``TargetPolicy``, filled batch by batch."""

    def __init__(
        self, policies: Mapping[str, Policy], epsilon: float, measured: Measured, reward_model: RewardModel | None
    ) -> None:
        self.probabilities: dict[str, list[Floats]] = {name: [] for name in policies}
        self.predicted_rewards: list[Floats] = []
        self._kinds: list[list[str]] = []
        self._measured_shares: list[float] = []
        self._measured, self._reward_model = measured, reward_model
        self._policies = {name: EpsilonSoft(policy, epsilon, rng_seed=0) for name, policy in policies.items()}

    def add(self, batch: Sequence[Experience]) -> None:
        views = [one.view for one in batch]
        choices_per_view = [legal_choices(view) for view in views]
        for name, soft in self._policies.items():
            distributions = soft.policy.distributions(views, choices_per_view)
            for distribution, choices in zip(distributions, choices_per_view, strict=True):
                self.probabilities[name].append(soft.soften(distribution, len(choices)))
        for one, choices in zip(batch, choices_per_view, strict=True):
            self._kinds.append([_kind(choice) for choice in choices])
            num_measured, num_eligible = self._measured.get(choices[one.chosen].action, (1, 1))
            self._measured_shares.append(num_measured / num_eligible)
        if self._reward_model is not None:
            rows = self._reward_model(views, choices_per_view)
            self.predicted_rewards += [np.asarray(row, np.float64) for row in rows]

    def logged(self, experiences: Experiences) -> LoggedDecisions:
        stored = experiences.stored
        return LoggedDecisions(
            runs=[e.run_id for e in stored],
            chosen=[e.chosen for e in stored],
            behaviour=np.array([e.probability for e in stored], np.float64),
            rewards=np.array([e.reward for e in stored], np.float64),
            kinds=self._kinds,
            measured=np.array(self._measured_shares, np.float64),
        )


def _kind(choice: Choice) -> str:
    """Return the kind by which support is counted: the action, and the blueprint of a germination."""
    return f"{choice.action} {choice.kernel.blueprint_id}" if choice.kernel else str(choice.action)
