"""The heuristic: grow the layer with the highest strain on a plateau, and keep seeds that do no harm.

The rule, in this order (docs/design/policies.md has the thresholds):
1. A seed in EVALUATING is fossilized if the metric is at most ``tolerance`` below its value before germination, and
   culled otherwise.
2. With ``max_active`` seeds in progress, or a germination less than ``cooldown_epochs`` epochs ago, it waits.
3. The metric is on a plateau if its best value of the last ``patience`` epochs exceeds the best value before them by
   less than ``min_gain``. Then the layer with the highest strain germinates:
   gradient_norm / sqrt(num_parameters) * (1 + dead_ratio). It takes the layer's first dormant seed and the kernel with
   the most parameters, up to ``max_growth`` times those of the layer.
4. Otherwise it waits.
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
    """Applies the rule of the module; the reason has the numbers that decided."""

    kind = "heuristic"

    def __init__(self, thresholds: HeuristicSettings) -> None:
        self._t = thresholds

    def distribution(self, view: GraphView, choices: Sequence[Choice]) -> ActionDistribution:
        """Return the rule's choice."""
        evaluated = next((s for s in view.seeds if s.stage is SeedStage.EVALUATING), None)
        if evaluated is not None:
            return self._fossilize_or_cull(view, choices, evaluated)
        num_active = sum(s.stage in ACTIVE_STAGES for s in view.seeds)
        if num_active >= self._t.max_active:
            return point_mass(0, f"{num_active} seed(s) in progress, the limit is {self._t.max_active}")
        if self._epochs_since_germination(view) < self._t.cooldown_epochs:
            return point_mass(0, f"cooldown: the last germination was less than {self._t.cooldown_epochs} epochs ago")
        values = [v for e in view.epochs if (v := e.metrics.get(self._t.metric)) is not None]
        if len(values) <= self._t.patience:
            return point_mass(0, f"{len(values)} epochs so far, plateau detection needs {self._t.patience + 1}")
        gain = max(values[-self._t.patience :]) - max(values[: -self._t.patience])
        gained = f"{self._t.metric} gained {gain:+.4f} in {self._t.patience} epochs"
        if gain >= self._t.min_gain:
            return point_mass(0, f"{gained}: still learning")
        return self._germinate(view, choices, f"plateau: {gained} (less than {self._t.min_gain})")

    def _fossilize_or_cull(self, view: GraphView, choices: Sequence[Choice], seed: SeedView) -> ActionDistribution:
        values = [(e.step, v) for e in view.epochs if (v := e.metrics.get(self._t.metric)) is not None]
        before = [v for step, v in values if step <= (seed.germinated_at_step or 0)][-self._t.patience :]
        after = [v for step, v in values if step > seed.since_step]
        if not after:
            return point_mass(0, f"no epoch ended since {seed.layer_id}:{seed.seed_id} entered evaluation")
        change = after[-1] - (sum(before) / len(before) if before else 0.0)
        is_kept = change >= -self._t.tolerance
        action = Action.FOSSILIZE if is_kept else Action.CULL
        verdict = f"at most {self._t.tolerance} worse" if is_kept else f"more than {self._t.tolerance} worse"
        index = next(n for n, c in enumerate(choices) if c.action is action and c.seed is seed)
        reference = f"the mean of the {len(before)} epochs before germination" if before else "0: no epoch ended before"
        return point_mass(index, f"{self._t.metric} {change:+.4f} against {reference} ({verdict}): {action}")

    def _germinate(self, view: GraphView, choices: Sequence[Choice], plateau: str) -> ActionDistribution:
        options = {c.seed.layer_id for c in choices if c.action is Action.GERMINATE and c.seed is not None}
        layers = [layer for layer in view.layers if layer.layer_id in options]
        if not layers:
            return point_mass(0, f"{plateau}, but no dormant seed has a kernel that fits")
        layer = max(layers, key=strain)
        sizes = [
            (n, c.kernel.num_parameters)
            for n, c in enumerate(choices)
            if c.action is Action.GERMINATE and c.seed and c.kernel and c.seed.layer_id == layer.layer_id
        ]
        limit = self._t.max_growth * layer.num_parameters
        allowed = [(n, size) for n, size in sizes if size <= limit] or [min(sizes, key=lambda s: s[1])]
        index = max(allowed, key=lambda s: s[1])[0]
        return point_mass(index, f"{plateau}; layer {layer.layer_id} has the highest strain ({strain(layer):.4f})")

    def _epochs_since_germination(self, view: GraphView) -> float:
        steps = [s.germinated_at_step for s in view.seeds if s.germinated_at_step is not None]
        if not steps:
            return math.inf
        return sum(1 for e in view.epochs if e.step > max(steps))


def strain(layer: LayerView) -> float:
    """Return the root mean square of a layer's gradient, times 1 + its share of dead channels; 0 if unknown."""
    gradient, dead = layer.health.get("gradient_norm"), layer.health.get("dead_ratio")
    if gradient is None:
        return 0.0
    return gradient / math.sqrt(max(1, layer.num_parameters)) * (1.0 + (dead or 0.0))
