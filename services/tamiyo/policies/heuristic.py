"""The heuristic: grow where it strains when accuracy stands still, keep what did no harm.

The rule, in this order (docs/design/policies.md has it with the thresholds):
1. A seed in EVALUATING is fossilized when the metric is no more than ``tolerance`` below what it
   was at germination, and culled otherwise.
2. With ``max_active`` seeds under way, or one that germinated less than ``cooldown_epochs``
   epochs ago, it waits.
3. The metric stands still when its best value of the last ``patience`` epochs is less than
   ``min_gain`` above the best before them. Then it germinates the layer with the most strain:
   gradient_norm / sqrt(num_parameters) * (1 + dead_ratio), in the layer's first dormant seed, with
   the kernel of the most parameters up to ``max_growth`` of the layer's own.
4. Else it waits.
"""

import math
from collections.abc import Sequence

from esper.graph.graph_view import GraphView, LayerView, SeedView
from esper.schemas.enums import Action, SeedStage
from esper.schemas.lifecycle import ACTIVE_STAGES
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.policies import ActionDistribution, Policy, point_mass
from esper.services.tamiyo.settings import HeuristicSettings


class HeuristicPolicy(Policy):
    """See the module."""

    kind = "heuristic"

    def __init__(self, thresholds: HeuristicSettings) -> None:
        self._t = thresholds

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """The rule's choice, with its reason in numbers."""
        evaluated = next((s for s in view.seeds if s.stage is SeedStage.EVALUATING), None)
        if evaluated is not None:
            return self._verdict(view, choices, evaluated)
        busy = [s for s in view.seeds if s.stage in ACTIVE_STAGES]
        if len(busy) >= self._t.max_active:
            return point_mass(0, f"{len(busy)} seed(s) under way, {self._t.max_active} at most")
        values = self._metric(view)
        if self._epochs_since_germination(view) < self._t.cooldown_epochs:
            return point_mass(0, f"the last seed germinated less than {self._t.cooldown_epochs} epochs ago")
        if len(values) <= self._t.patience:
            return point_mass(0, f"{len(values)} epochs so far; {self._t.patience + 1} are needed to see a plateau")
        gain = max(values[-self._t.patience :]) - max(values[: -self._t.patience])
        if gain >= self._t.min_gain:
            return point_mass(0, f"{self._t.metric} gained {gain:+.4f} lately: still learning")
        return self._grow(view, choices, gain)

    def _verdict(self, view: GraphView, choices: Sequence[Choice], seed: SeedView) -> ActionDistribution:
        values = [(e.step, e.metrics.get(self._t.metric)) for e in view.epochs]
        known = [(step, v) for step, v in values if v is not None]
        before = [v for step, v in known if step <= (seed.germinated_at_step or 0)][-self._t.patience :]
        after = [v for step, v in known if step > seed.since_step]
        if not after:
            return point_mass(0, f"no epoch ended since {seed.layer_id}:{seed.seed_id} came to be evaluated")
        change = after[-1] - (sum(before) / len(before) if before else 0.0)
        is_kept = change >= -self._t.tolerance
        action = Action.FOSSILIZE if is_kept else Action.CULL
        told = f"{self._t.metric} {change:+.4f} against the {len(before)} epochs before it germinated"
        verdict = "it stays" if is_kept else f"worse by more than {self._t.tolerance}"
        return point_mass(_index(choices, action, seed), f"{told}: {verdict}")

    def _grow(self, view: GraphView, choices: Sequence[Choice], gain: float) -> ActionDistribution:
        options = {c.seed.layer_id for c in choices if c.action is Action.GERMINATE and c.seed is not None}
        layers = [layer for layer in view.layers if layer.layer_id in options]
        if not layers:
            return point_mass(0, "nothing can germinate: no dormant seed has a kernel that fits")
        layer = max(layers, key=strain)
        fitting = [
            (n, c.kernel.num_parameters)
            for n, c in enumerate(choices)
            if c.action is Action.GERMINATE and c.seed and c.kernel and c.seed.layer_id == layer.layer_id
        ]
        limit = self._t.max_growth * layer.num_parameters
        small = [(n, size) for n, size in fitting if size <= limit] or [min(fitting, key=lambda f: f[1])]
        index = max(small, key=lambda f: f[1])[0]
        return point_mass(
            index,
            f"plateau: {self._t.metric} gained {gain:+.4f} in {self._t.patience} epochs (below "
            f"{self._t.min_gain}); {layer.layer_id} strains most ({strain(layer):.4f})",
        )

    def _metric(self, view: GraphView) -> list[float]:
        return [v for e in view.epochs if (v := e.metrics.get(self._t.metric)) is not None]

    def _epochs_since_germination(self, view: GraphView) -> float:
        steps = [s.germinated_at_step for s in view.seeds if s.germinated_at_step is not None]
        if not steps:
            return math.inf
        return sum(1 for e in view.epochs if e.step > max(steps))


def strain(layer: LayerView) -> float:
    """How hard training pulls at a layer: its gradient's root mean square, more where channels are dead."""
    gradient, dead = layer.health.get("gradient_norm"), layer.health.get("dead_ratio")
    if gradient is None:
        return 0.0
    return gradient / math.sqrt(max(1, layer.num_parameters)) * (1.0 + (dead or 0.0))


def _index(choices: Sequence[Choice], action: Action, seed: SeedView) -> int:
    return next(n for n, c in enumerate(choices) if c.action is action and c.seed is seed)
