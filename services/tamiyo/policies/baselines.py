"""The baselines that a learnt policy must beat: wait, random, schedule."""

from collections import Counter
from collections.abc import Sequence

from esper.graph.graph_view import GraphView
from esper.schemas.enums import Action, SeedStage
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.policies import ActionDistribution, Policy, point_mass

CULL, EARLY_CULL = 0.3, 0.03  # the weight of a cull, and of one that nobody has judged yet, where another action has 1


class WaitPolicy(Policy):
    """Never grows."""

    kind = "wait"

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """WAIT."""
        return point_mass(0, "the wait policy never grows")


class RandomPolicy(Policy):
    """Any legal choice, all alike.

    Args:
        wait_share: the weight of WAIT, where something else can be chosen; the other actions then share the rest
            evenly, and so do the choices of each, but that culls have less weight, and least before EVALUATING: what
            is germinated should stand long enough to be measured. Without it a run of many kernels would hardly ever
            wait, and cull what it germinated at once.
    """

    kind = "random"

    def __init__(self, wait_share: float | None = None) -> None:
        self._wait_share = wait_share

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """The same weight on every choice, or on every choice of an action."""
        told = "the random policy has no favourite"
        if self._wait_share is None or len(choices) == 1:
            return ActionDistribution(dict.fromkeys(range(len(choices)), 1.0 / len(choices)), told)
        kinds = [(choice.action, _is_early_cull(choice)) for choice in choices[1:]]
        num_alike = Counter(kinds)
        total = sum(_weight(kind) for kind in num_alike)
        shares = [_weight(kind) / num_alike[kind] / total for kind in kinds]
        rest = 1.0 - self._wait_share
        return ActionDistribution({0: self._wait_share, **{n: rest * share for n, share in enumerate(shares, 1)}}, told)


class SchedulePolicy(Policy):
    """Germinates every ``every_epochs`` epochs, layer after layer, and fossilizes what is evaluated."""

    kind = "schedule"

    def __init__(self, every_epochs: int) -> None:
        self._every = every_epochs

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """Fossilize first; else germinate when it is time; else wait."""
        for index, choice in enumerate(choices):
            if choice.action is Action.FOSSILIZE:
                return point_mass(index, "the schedule fossilizes every seed that is evaluated")
        started = [s for s in view.seeds if s.germinated_at_step is not None]
        due = view.num_epochs // self._every
        options = [n for n, c in enumerate(choices) if c.action is Action.GERMINATE]
        if len(started) < due and options:
            reason = f"{view.num_epochs} epochs, one seed every {self._every}: {len(started)} of {due} so far"
            return point_mass(options[len(started) % len(options)], reason)
        return point_mass(0, f"the schedule has {due} seeds by now, and {len(started)} germinated")


def _weight(kind: tuple[Action, bool]) -> float:
    action, is_early = kind
    return EARLY_CULL if is_early else CULL if action is Action.CULL else 1.0


def _is_early_cull(choice: Choice) -> bool:
    return choice.action is Action.CULL and choice.seed is not None and choice.seed.stage is not SeedStage.EVALUATING
