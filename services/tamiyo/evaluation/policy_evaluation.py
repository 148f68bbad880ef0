"""Judges policies on experiences: brings both into the form of ``esper.services.tamiyo.evaluation.off_policy``."""

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
from esper.services.tamiyo.policies import ActionDistribution, EpsilonSoft, Policy
from esper.services.tamiyo.policies.baselines import RandomPolicy, SchedulePolicy, WaitPolicy
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.settings import TamiyoSettings

AS_LOGGED = "as logged"
"""The policies that acted: what really happened."""

Measured = Mapping[str, tuple[int, int]]
"""Action -> decisions whose outcome was measured, of how many that could have been (``ExperienceJoin.measured``)."""


BATCH_SIZE = 256
"""Views that are open at the same time, and that a policy is asked about in one go."""


class RewardModel(Protocol):
    """A model of the reward, for the doubly robust estimate. Fit on other runs than those it is asked about."""

    def __call__(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[Sequence[float]]:
        """Of each view the reward of each of its choices, in units of the metric."""
        ...


def baselines(tamiyo: TamiyoSettings) -> dict[str, Policy]:
    """The policies that a learnt one must beat, as the settings have them."""
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
    evaluation_settings: EvaluationSettings | None = None,
    candidate: str | None = None,
    reward_model: RewardModel | None = None,
    tell: Callable[[int], None] = lambda _num: None,
) -> Comparison:
    """Judge policies, each made epsilon-soft, on the same held-out experiences, beside what really happened.

    Args:
        measured: which share of outcomes the log tells; 1 for an action that is not in it.
        candidate: the policy to compare with each of the others.
        guesser: gives doubly robust estimates, where there is a model of the reward.
        tell: is called with the number of experiences that are done.
    """
    facing = _Facing(policies, epsilon, measured, reward_model)
    for start in range(0, len(experiences), BATCH_SIZE):
        some = list(experiences[start : start + BATCH_SIZE])
        facing.add(some)
        tell(start + len(some))
    logged = facing.logged(experiences)
    targets = [TargetPolicy(AS_LOGGED, logged.behaviour)]
    targets += [TargetPolicy.of(name, logged, rows) for name, rows in facing.rows.items()]
    return compare(
        logged,
        targets,
        evaluation_settings or EvaluationSettings(),
        facing.predicted_rewards if reward_model else None,
        candidate,
    )


def verdict_of(found: Comparison, difference: Difference, held_out_runs: Sequence[str], level: float) -> dict[str, Any]:
    """What the event of an evaluation says of one difference, but for the names and versions of the policies.

    Of SNIPS and doubly robust it is the one with the lower low end: the more careful.
    """
    judged = [found.judged[difference.name], found.judged[difference.than]]
    refusals = [f"{one.name}: {refusal}" for one in judged for refusal in one.refusals]
    estimates = {"snips": difference.snips, "dr": difference.dr}
    estimator, interval = min(((n, i) for n, i in estimates.items() if i is not None), key=lambda e: e[1].low)
    verdict = "too_thin" if refusals else "better" if difference.is_better else "not_better"
    told = {"estimate": interval.value, "low": interval.low, "high": interval.high}
    return {
        "estimator": estimator,
        **(told if difference.is_supported else dict.fromkeys(told)),
        "confidence": level,
        "effective_sample_size": judged[0].ess,
        "num_decisions": found.num_decisions,
        "held_out_runs": list(held_out_runs),
        "verdict": verdict,
        "reason": "; ".join(refusals)
        or f"{estimator} {interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})",
    }


class _Facing:
    """What policies would have done in front of experiences, column by column."""

    def __init__(
        self, policies: Mapping[str, Policy], epsilon: float, measured: Measured, reward_model: RewardModel | None
    ) -> None:
        self.rows: dict[str, list[Floats]] = {name: [] for name in policies}
        self.predicted_rewards: list[Floats] = []
        self._kinds: list[list[str]] = []
        self._shares: list[float] = []
        self._measured, self._guesser = measured, reward_model
        self._ahead = {name: _Ahead(policy) for name, policy in policies.items()}
        self._acting = {name: EpsilonSoft(policy, epsilon, rng_seed=0) for name, policy in self._ahead.items()}

    def add(self, some: Sequence[Experience]) -> None:
        """Ask every policy about some experiences."""
        views = [one.view for one in some]
        choices_per_view = [legal_choices(view) for view in views]
        for name, ahead in self._ahead.items():
            ahead.look_at(views, choices_per_view)
            for view in views:
                _choices, probabilities, _reason = self._acting[name].probabilities(view)
                self.rows[name].append(np.asarray(probabilities, np.float64))
        for one, choices in zip(some, choices_per_view, strict=True):
            self._kinds.append([kind_of(choice) for choice in choices])
            told, eligible = self._measured.get(choices[one.chosen].action, (1, 1))
            self._shares.append(told / eligible)
        if self._guesser is not None:
            self.predicted_rewards += [np.asarray(row, np.float64) for row in self._guesser(views, choices_per_view)]

    def logged(self, experiences: Experiences) -> LoggedDecisions:
        """What really happened."""
        stored = experiences.stored
        return LoggedDecisions(
            runs=[e.run_id for e in stored],
            chosen=[e.chosen for e in stored],
            behaviour=np.array([e.probability for e in stored], np.float64),
            rewards=np.array([e.reward for e in stored], np.float64),
            kinds=self._kinds,
            measured=np.array(self._shares, np.float64),
        )


class _Ahead(Policy):
    """A policy that is asked about many views in one go."""

    def __init__(self, policy: Policy) -> None:
        self.kind = policy.kind
        self._policy = policy
        self._known: dict[int, ActionDistribution] = {}

    def look_at(self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]]) -> None:
        """Ask about these; ``favour`` knows the answers as long as the views live."""
        favourites = self._policy.distributions(views, choices_per_view)
        self._known = {id(view): favourite for view, favourite in zip(views, favourites, strict=True)}

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """What the policy said, or says now."""
        known = self._known.get(id(view))
        return self._policy.distribution(view, choices) if known is None else known


def kind_of(choice: Choice) -> str:
    """What support is counted by: the action, with the blueprint where one is germinated."""
    return f"{choice.action} {choice.kernel.blueprint_id}" if choice.kernel else str(choice.action)
