"""What can be chosen at a boundary: WAIT, or one action for one seed."""

from collections.abc import Iterator
from dataclasses import dataclass

from esper.graph.view import GraphView, KernelView, SeedView
from esper.schemas.enums import Action, SeedStage
from esper.schemas.lifecycle import ACTIVE_STAGES


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing to do. ``kernel`` goes with GERMINATE alone, ``seed`` with all but WAIT."""

    action: Action
    seed: SeedView | None = None
    kernel: KernelView | None = None


WAIT = Choice(Action.WAIT)


def legal_choices(view: GraphView) -> tuple[Choice, ...]:
    """Everything that the lifecycle and the kernels at hand allow; WAIT is the first. Always in one order."""
    return (WAIT, *_of_seeds(view))


def _of_seeds(view: GraphView) -> Iterator[Choice]:
    layers = {layer.layer_id: layer for layer in view.layers}
    for seed in view.seeds:
        layer = layers[seed.layer_id]
        if seed.stage is SeedStage.DORMANT:
            for kernel in view.kernels:
                if (kernel.target, kernel.num_features) == (layer.kind, layer.num_features):
                    yield Choice(Action.GERMINATE, seed, kernel)
        if seed.stage in ACTIVE_STAGES:
            yield Choice(Action.CULL, seed)
        if seed.stage is SeedStage.EVALUATING:
            yield Choice(Action.FOSSILIZE, seed)
