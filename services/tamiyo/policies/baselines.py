"""The baselines that a learned policy must beat: wait, random, schedule."""

from collections import Counter
from collections.abc import Sequence

from esper.graph.graph_view import GraphView
from esper.schemas.enums import Action, SeedStage
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.policies import ActionDistribution, Policy, point_mass

CULL, EARLY_CULL = 0.3, 0.03  # weight of a cull in EVALUATING and before it, where any other action has 1


class WaitPolicy(Policy):
    """Never grows."""

    kind = "wait"

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """Return WAIT."""
        return point_mass(0, "the wait policy never grows")


class RandomPolicy(Policy):
    """Samples from all legal choices, uniformly by default.

    Args:
        wait_share: probability of WAIT where another choice exists. The other actions share the rest evenly, and the
            choices of an action share its part, except that culls weigh less, and least before EVALUATING: a seed
            should live long enough to be measured. With a uniform distribution a run with many kernels hardly ever
            waits, and culls a seed right after its germination.
    """

    kind = "random"

    def __init__(self, wait_share: float | None = None) -> None:
        self._wait_share = wait_share

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """Return the uniform distribution over choices, or over actions and their choices."""
        reason = "the random policy prefers no choice"
        if self._wait_share is None or len(choices) == 1:
            return ActionDistribution(dict.fromkeys(range(len(choices)), 1.0 / len(choices)), reason)
        kinds = [(choice.action, _is_early_cull(choice)) for choice in choices[1:]]
        num_of_kind = Counter(kinds)
        total = sum(_weight(kind) for kind in num_of_kind)
        scale = (1.0 - self._wait_share) / total
        others = {n: scale * _weight(kind) / num_of_kind[kind] for n, kind in enumerate(kinds, 1)}
        return ActionDistribution({0: self._wait_share, **others}, reason)


class SchedulePolicy(Policy):
    """Germinates every ``every_epochs`` epochs, layer after layer, and fossilizes every seed in EVALUATING."""

    kind = "schedule"

    def __init__(self, every_epochs: int) -> None:
        self._every = every_epochs

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """Fossilize if possible; otherwise germinate if the schedule says so; otherwise wait."""
        for index, choice in enumerate(choices):
            if choice.action is Action.FOSSILIZE:
                return point_mass(index, "the schedule fossilizes every evaluated seed")
        num_germinated = sum(s.germinated_at_step is not None for s in view.seeds)
        num_scheduled = view.num_epochs // self._every
        options = [n for n, c in enumerate(choices) if c.action is Action.GERMINATE]
        count = f"{num_germinated} of {num_scheduled} scheduled seeds germinated by epoch {view.num_epochs}"
        if num_germinated < num_scheduled and options:
            return point_mass(options[num_germinated % len(options)], f"{count}: one every {self._every} epochs")
        return point_mass(0, count)


def _weight(kind: tuple[Action, bool]) -> float:
    action, is_early = kind
    return EARLY_CULL if is_early else CULL if action is Action.CULL else 1.0


def _is_early_cull(choice: Choice) -> bool:
    return choice.action is Action.CULL and choice.seed is not None and choice.seed.stage is not SeedStage.EVALUATING
