"""The policy interface, and the epsilon-soft policy that samples decisions from it.

A ``Policy`` gives a distribution over the legal choices of a view. ``EpsilonSoft`` mixes it with the uniform
distribution and samples, so that every legal choice has a known probability above 0 and the log supports off-policy
evaluation.
Invariant: a policy that fails on a view costs only that view its choice (WAIT, with the error).
"""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from esper.graph.graph_view import GraphView
from esper.services.tamiyo.control.legal_choices import WAIT, Choice, legal_choices

MIN_EPSILON = 0.05
TOLERANCE = 1e-3  # largest deviation of a sum of probabilities from 1; softmax in float32 deviates by less


@dataclass(frozen=True, slots=True)
class ActionDistribution:
    """Probabilities that sum to 1: of every choice (C,), or by index of the choices above 0; and why."""

    probabilities: Mapping[int, float] | NDArray[np.float64]
    reason: str

    def dense(self, num_choices: int) -> NDArray[np.float64]:
        """Return the probability of every choice, (C,).

        Raises:
            ValueError: the numbers are no distribution, or there is no reason. Such a policy must not act.
        """
        if isinstance(self.probabilities, np.ndarray):
            found: NDArray[np.float64] = self.probabilities
            if found.shape != (num_choices,):
                raise ValueError(f"the policy gave probabilities of shape {found.shape} for {num_choices} choices")
        else:
            if not all(0 <= n < num_choices for n in self.probabilities):
                raise ValueError(f"the policy gave a probability to a choice outside 0..{num_choices - 1}")
            found = np.zeros(num_choices)
            found[list(self.probabilities)] = list(self.probabilities.values())
        if not np.all(np.isfinite(found) & (found >= 0.0)):
            raise ValueError("the policy gave a probability that is negative or not finite")
        if not math.isclose(float(found.sum()), 1.0, abs_tol=TOLERANCE):
            raise ValueError(f"the policy's probabilities sum to {float(found.sum()):.6g}, not to 1")
        if not self.reason:
            raise ValueError("the policy gave no reason")
        return found


class Policy(Protocol):
    """Maps a view to a distribution over its legal choices. Pure: equal views give equal distributions."""

    kind: str

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """Return the distribution over ``choices``, the first of which is WAIT."""
        ...

    def distributions(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[ActionDistribution]:
        """Return what ``distribution`` gives for each view, in order. Override it where a batch is faster."""
        return [self.distribution(view, choices) for view, choices in zip(views, choices_per_view, strict=True)]


@dataclass(frozen=True, slots=True)
class SampledChoice:
    """A choice and its probability under the behaviour policy, in (0, 1].

    ``error`` describes a failure of the policy. The choice is then WAIT with probability 1: nothing was sampled.
    """

    choice: Choice
    probability: float
    reason: str
    error: str | None = None


class EpsilonSoft:
    """Samples from ``policy`` with probability 1 - epsilon, otherwise uniformly from all legal choices.

    Sutton and Barto 2018, Reinforcement Learning, section 5.4. The draw depends on seed, run, incarnation and boundary
    alone, so a view gets the same choice whenever it is sampled.

    Raises:
        ValueError: epsilon is outside ``MIN_EPSILON``..1.
    """

    def __init__(self, policy: Policy, epsilon: float, rng_seed: int) -> None:
        if not MIN_EPSILON <= epsilon <= 1.0:
            raise ValueError(
                f"epsilon must be in {MIN_EPSILON}..1, not {epsilon}: a log without exploration supports no evaluation"
            )
        self.policy = policy
        self._epsilon = epsilon
        self._rng_seed = rng_seed

    def choose(self, view: GraphView) -> SampledChoice:
        """Sample a choice for one boundary.

        Raises:
            Exception: what the policy raises; ValueError if its probabilities are no distribution.
        """
        choices = legal_choices(view)
        return self._sample(view, choices, self.policy.distribution(view, choices))

    def choose_all(self, views: Sequence[GraphView]) -> list[SampledChoice]:
        """Sample a choice for each view, with one call of the policy; each equals what ``choose`` gives.

        If that call fails, each view is tried by itself. A view on which the policy fails then gets WAIT and the error.
        """
        try:
            choices_per_view = [legal_choices(view) for view in views]
            distributions = list(self.policy.distributions(views, choices_per_view))
            if len(distributions) != len(views):
                raise ValueError(f"the policy gave {len(distributions)} distributions for {len(views)} views")
        except Exception:
            return [self._sample_or_wait(view) for view in views]
        return [self._sample_or_wait(*one) for one in zip(views, choices_per_view, distributions, strict=True)]

    def soften(self, distribution: ActionDistribution, num_choices: int) -> NDArray[np.float64]:
        """Return the probability that each choice is sampled with, (C,): at least epsilon / C, sum 1.

        Raises:
            ValueError: the policy's probabilities are no distribution.
        """
        softened: NDArray[np.float64] = distribution.dense(num_choices)
        return self._epsilon / num_choices + (1.0 - self._epsilon) * softened

    def _sample_or_wait(
        self,
        view: GraphView,
        choices: Sequence[Choice] | None = None,
        distribution: ActionDistribution | None = None,
    ) -> SampledChoice:
        try:
            if choices is None or distribution is None:
                return self.choose(view)
            return self._sample(view, choices, distribution)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".rstrip(": ")
            return SampledChoice(WAIT, 1.0, f"wait: the policy failed on this view ({error:.500})", error)

    def _sample(self, view: GraphView, choices: Sequence[Choice], distribution: ActionDistribution) -> SampledChoice:
        probabilities = self.soften(distribution, len(choices))
        cumulative = probabilities.cumsum()
        point = self._generator(view).random() * cumulative[-1]
        index = min(int(cumulative.searchsorted(point, side="right")), len(choices) - 1)
        probability, reason = float(probabilities[index]), distribution.reason
        if probability < probabilities.max():
            is_exploration = math.isclose(probability, self._epsilon / len(choices))
            preferred = choices[int(probabilities.argmax())].action
            how = f"exploration (epsilon {self._epsilon})" if is_exploration else f"sampled at {probability:.1%}"
            reason = f"{how}; preferred: {preferred}, because {reason}"
        return SampledChoice(choices[index], probability, reason)

    def _generator(self, view: GraphView) -> random.Random:
        name = f"{self._rng_seed}:{view.run_id}:{view.incarnation}:{view.boundary}"
        return random.Random(hashlib.sha256(name.encode()).digest())


def point_mass(index: int, reason: str) -> ActionDistribution:
    """Return the distribution that gives one choice probability 1."""
    return ActionDistribution({index: 1.0}, reason)
