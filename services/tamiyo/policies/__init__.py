"""Policies behind one seam: each names its favourite among the legal choices, and why.

``EpsilonSoft`` acts: it takes the favourite most of the time and any legal choice otherwise,
so that a log can be learnt from, and says with what probability it chose.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from esper.graph.view import GraphView
from esper.services.tamiyo.choices import Choice, legal_choices

MIN_EPSILON = 0.05


@dataclass(frozen=True, slots=True)
class Favourite:
    """What a policy would do: ``weights`` over the legal choices sum to 1."""

    weights: Mapping[int, float]
    reason: str


class Policy(Protocol):
    """A way to prefer. Pure: the same view gives the same favourite."""

    kind: str

    def favour(self, view: GraphView, choices: Sequence[Choice]) -> Favourite:
        """The favourite among ``choices``, whose first is WAIT."""
        ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice with its probability under the acting policy, in (0, 1]."""

    choice: Choice
    probability: float
    reason: str


class EpsilonSoft:
    """Acts by ``policy`` with probability 1 - epsilon, else by a uniform draw from all legal choices."""

    def __init__(self, policy: Policy, epsilon: float, rng_seed: int) -> None:
        if not MIN_EPSILON <= epsilon <= 1.0:
            raise ValueError(f"epsilon must be in {MIN_EPSILON}..1: without chance no log can be learnt from")
        self.policy = policy
        self._epsilon = epsilon
        self._rng_seed = rng_seed

    def probabilities(self, view: GraphView) -> tuple[Sequence[Choice], list[float], str]:
        """The legal choices, the probability of each (they sum to 1), and the favourite's reason."""
        choices = legal_choices(view)
        favourite = self.policy.favour(view, choices)
        floor = self._epsilon / len(choices)
        weights = [floor + (1.0 - self._epsilon) * favourite.weights.get(n, 0.0) for n in range(len(choices))]
        return choices, weights, favourite.reason

    def choose(self, view: GraphView) -> Chosen:
        """Choose for one boundary. The same view and seed give the same choice."""
        choices, weights, reason = self.probabilities(view)
        index = self._generator(view).choices(range(len(choices)), weights)[0]
        if weights[index] < max(weights):
            reason = f"exploration (epsilon {self._epsilon}); the policy said: {reason}"
        return Chosen(choices[index], weights[index], reason)

    def _generator(self, view: GraphView) -> random.Random:
        named = f"{self._rng_seed}:{view.run_id}:{view.incarnation}:{view.boundary}"
        return random.Random(hashlib.sha256(named.encode()).digest())


def only(index: int, reason: str) -> Favourite:
    """All weight on one choice."""
    return Favourite({index: 1.0}, reason)
