"""Judges policies on experiences: brings both into the form of ``esper.services.tamiyo.off_policy``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from esper.graph.view import GraphView
from esper.schemas.enums import Action
from esper.services.tamiyo.choices import Choice
from esper.services.tamiyo.experiences import Experience, Experiences
from esper.services.tamiyo.off_policy import Comparison, Floats, Judging, Logged, Target, compare
from esper.services.tamiyo.policies import EpsilonSoft, Policy
from esper.services.tamiyo.policies.baselines import RandomPolicy, SchedulePolicy, WaitPolicy
from esper.services.tamiyo.policies.heuristic import HeuristicPolicy
from esper.services.tamiyo.settings import TamiyoSettings

AS_LOGGED = "as logged"
"""The policies that acted: what really happened."""

Measured = Mapping[str, tuple[int, int]]
"""Action -> decisions whose outcome was measured, of how many that could have been (``Joined.measured``)."""


class Guesser(Protocol):
    """A model of the reward, for the doubly robust estimate. Fit on other runs than those it is asked about."""

    def __call__(self, view: GraphView, choices: Sequence[Choice]) -> Sequence[float]:
        """The reward of each choice, in units of the metric."""
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
    judging: Judging | None = None,
    candidate: str | None = None,
    guesser: Guesser | None = None,
    tell: Callable[[int], None] = lambda _num: None,
) -> Comparison:
    """Judge policies, each made epsilon-soft, on the same held-out experiences, beside what really happened.

    Args:
        measured: which share of outcomes the log tells; 1 for an action that is not in it.
        candidate: the policy to compare with each of the others.
        guesser: gives doubly robust estimates, where there is a model of the reward.
        tell: is called with the number of experiences that are done.
    """
    acting = {name: EpsilonSoft(policy, epsilon, rng_seed=0) for name, policy in policies.items()}
    rows: dict[str, list[Floats]] = {name: [] for name in acting}
    kinds: list[list[str]] = []
    guesses: list[Floats] = []
    shares: list[float] = []
    for done, one in enumerate(experiences):
        choices = _weigh(one, acting, rows)
        kinds.append([kind_of(choice) for choice in choices])
        shares.append(_share(measured, choices[one.chosen].action))
        if guesser is not None:
            guesses.append(np.asarray(guesser(one.view, choices), np.float64))
        tell(done + 1)
    stored = experiences.stored
    logged = Logged(
        runs=[e.run_id for e in stored],
        chosen=[e.chosen for e in stored],
        behaviour=np.array([e.probability for e in stored], np.float64),
        rewards=np.array([e.reward for e in stored], np.float64),
        kinds=kinds,
        measured=np.array(shares, np.float64),
    )
    targets = [Target(AS_LOGGED, logged.behaviour)]
    targets += [Target.of(name, logged, rows[name]) for name in acting]
    return compare(logged, targets, judging or Judging(), guesses if guesser is not None else None, candidate)


def _weigh(one: Experience, acting: Mapping[str, EpsilonSoft], rows: Mapping[str, list[Floats]]) -> Sequence[Choice]:
    """Add the probabilities of every policy; gives the choices that there were."""
    choices: Sequence[Choice] = ()
    for name, policy in acting.items():
        choices, probabilities, _reason = policy.probabilities(one.view)
        rows[name].append(np.asarray(probabilities, np.float64))
    return choices


def kind_of(choice: Choice) -> str:
    """What support is counted by: the action, with the blueprint where one is germinated."""
    return f"{choice.action} {choice.kernel.blueprint_id}" if choice.kernel else str(choice.action)


def _share(measured: Measured, action: Action) -> float:
    told, eligible = measured.get(action, (1, 1))
    return told / eligible
