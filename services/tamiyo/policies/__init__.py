"""Policies behind one seam: each names its favourite among the legal choices, and why.

``EpsilonSoft`` acts: it takes the favourite most of the time and any legal choice otherwise,
so that a log can be learnt from, and says with what probability it chose.
Invariant: a view on which a policy fails costs that view its choice (WAIT, with the error), and no other view anything.
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
TOLERANCE = 1e-3  # by which weights may miss 1: those of float32 networks do


@dataclass(frozen=True, slots=True)
class ActionDistribution:
    """What a policy would do: weights that sum to 1, of every choice (C,), or by index of those that have any."""

    weights: Mapping[int, float] | NDArray[np.float64]
    reason: str

    def dense(self, num_choices: int) -> NDArray[np.float64]:
        """The weight of every choice, (C,).

        Raises:
            ValueError: they are no distribution; a policy whose numbers broke must not act by them.
        """
        if isinstance(self.weights, np.ndarray):
            found: NDArray[np.float64] = self.weights
            if found.shape != (num_choices,):
                raise ValueError(f"the policy gave {found.shape} weights for {num_choices} choices")
        else:
            if not all(0 <= n < num_choices for n in self.weights):
                raise ValueError(f"the policy weighs a choice that is none of the {num_choices}")
            found = np.zeros(num_choices)
            found[list(self.weights)] = list(self.weights.values())
        if not np.all(np.isfinite(found) & (found >= 0.0)):
            raise ValueError("the policy gave a weight that is negative or not finite")
        if not math.isclose(float(found.sum()), 1.0, abs_tol=TOLERANCE):
            raise ValueError(f"the policy's weights sum to {float(found.sum()):.6g}, not to 1")
        if not self.reason:
            raise ValueError("the policy gave no reason")
        return found


class Policy(Protocol):
    """A way to prefer. Pure: the same view gives the same favourite.

    Whoever has a faster way for many views at once has a ``distributions`` of its own.
    """

    kind: str

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """The favourite among ``choices``, whose first is WAIT."""
        ...

    def distributions(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[ActionDistribution]:
        """The favourites of many views, in their order: the same as ``favour`` gives one by one."""
        return [self.distribution(view, choices) for view, choices in zip(views, choices_per_view, strict=True)]


@dataclass(frozen=True, slots=True)
class SampledChoice:
    """A choice with its probability under the acting policy, in (0, 1].

    ``error`` is what the policy failed with; then the choice is WAIT, and nothing was drawn.
    """

    choice: Choice
    probability: float
    reason: str
    error: str | None = None


class EpsilonSoft:
    """Acts by ``policy`` with probability 1 - epsilon, else by a uniform draw from all legal choices."""

    def __init__(self, policy: Policy, epsilon: float, rng_seed: int) -> None:
        if not MIN_EPSILON <= epsilon <= 1.0:
            raise ValueError(f"epsilon must be in {MIN_EPSILON}..1: without chance no log can be learnt from")
        self.policy = policy
        self._epsilon = epsilon
        self._rng_seed = rng_seed

    def probabilities(self, view: GraphView) -> tuple[Sequence[Choice], NDArray[np.float64], str]:
        """The legal choices, the probability of each (they sum to 1), and the favourite's reason.

        Raises:
            Exception: whatever the policy raises, and ValueError where its weights are no distribution.
        """
        choices = legal_choices(view)
        favourite = self.policy.distribution(view, choices)
        return choices, self._soften(favourite, len(choices)), favourite.reason

    def choose(self, view: GraphView) -> SampledChoice:
        """Choose for one boundary. The same view and seed give the same choice.

        Raises:
            Exception: whatever the policy raises.
        """
        choices = legal_choices(view)
        return self._draw(view, choices, self.policy.distribution(view, choices))

    def choose_all(self, views: Sequence[GraphView]) -> list[SampledChoice]:
        """Choose for many, with one call of the policy; each gets what ``choose`` gives it alone.

        Where the policy fails, the views are tried one by one: one on which it fails alone gets WAIT, with the error.
        """
        try:
            choices_per_view = [legal_choices(view) for view in views]
            favourites = list(self.policy.distributions(views, choices_per_view))
            if len(favourites) != len(views):
                raise ValueError(f"the policy gave {len(favourites)} favourites for {len(views)} views")
        except Exception:
            return [self._choose_or_wait(view) for view in views]
        return [
            self._draw_or_wait(view, choices, favourite)
            for view, choices, favourite in zip(views, choices_per_view, favourites, strict=True)
        ]

    def _choose_or_wait(self, view: GraphView) -> SampledChoice:
        try:
            return self.choose(view)
        except Exception as error:
            return _waiting(error)

    def _draw_or_wait(self, view: GraphView, choices: Sequence[Choice], favourite: ActionDistribution) -> SampledChoice:
        try:
            return self._draw(view, choices, favourite)
        except Exception as error:
            return _waiting(error)

    def _draw(self, view: GraphView, choices: Sequence[Choice], favourite: ActionDistribution) -> SampledChoice:
        weights = self._soften(favourite, len(choices))
        running = weights.cumsum()
        point = self._generator(view).random() * running[-1]
        index = min(int(running.searchsorted(point, side="right")), len(choices) - 1)
        reason, least = favourite.reason, self._epsilon / len(choices)
        if weights[index] < weights.max():
            is_unwanted = math.isclose(weights[index], least)
            how = f"exploration (epsilon {self._epsilon})" if is_unwanted else f"drawn at {weights[index]:.1%}"
            reason = f"{how}; the policy said: {reason}"
        return SampledChoice(choices[index], float(weights[index]), reason)

    def _soften(self, favourite: ActionDistribution, num_choices: int) -> NDArray[np.float64]:
        softened: NDArray[np.float64] = self._epsilon / num_choices + (1.0 - self._epsilon) * favourite.dense(
            num_choices
        )
        return softened

    def _generator(self, view: GraphView) -> random.Random:
        named = f"{self._rng_seed}:{view.run_id}:{view.incarnation}:{view.boundary}"
        return random.Random(hashlib.sha256(named.encode()).digest())


def point_mass(index: int, reason: str) -> ActionDistribution:
    """All weight on one choice."""
    return ActionDistribution({index: 1.0}, reason)


def _waiting(error: Exception) -> SampledChoice:
    told = f"{type(error).__name__}: {error}".rstrip(": ")
    return SampledChoice(WAIT, 1.0, f"the policy failed on this view, so nothing is done: {told:.500}", told)
