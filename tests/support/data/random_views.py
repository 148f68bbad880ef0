"""Random graph views of any size."""

import random
from dataclasses import replace

from esper.graph.graph_view import EpochView, GraphView, KernelView, LayerView, SeedView
from esper.graph.health_windows import FIELDS
from esper.schemas.enums import BreakerState, LayerKind, SeedStage

WIDTHS = (8, 16, 32)
MOSTLY_DORMANT = (SeedStage.DORMANT,) * 6 + tuple(SeedStage)


def drawn_view(
    rng: random.Random,
    num_layers: int,
    *,
    seeds_per_layer: int = 4,
    num_blueprints: int = 4,
    run_id: str = "drawn",
    unknown: tuple[None, ...] = (None,),
) -> GraphView:
    """A view of ``num_layers`` layers, with a kernel of each blueprint for each kind and width.

    Args:
        unknown: values of a statistic besides random numbers; empty if everything was measured.
    """

    def health() -> dict[str, float | None]:
        return {name: rng.choice((*unknown, rng.gauss(0, 1), 1000 * rng.random())) for name in FIELDS}

    names = [f"layer{n}" for n in range(num_layers)]
    layers = tuple(
        LayerView(
            name, rng.choice(tuple(LayerKind)), rng.choice(WIDTHS), rng.randrange(10, 10**6), seeds_per_layer,
            health(), rng.choice((*unknown, 0.0)), health(), rng.randrange(64),
        )
        for name in names
    )  # fmt: skip
    seeds = tuple(
        SeedView(
            name, n, rng.choice(MOSTLY_DORMANT), rng.randrange(50), None, rng.randrange(999), None, health(), health(),
            0.0, 16, rng.randrange(500), rng.randrange(3), rng.randrange(3), rng.choice(tuple(BreakerState)), 0, 0,
        )
        for name in names
        for n in range(seeds_per_layer)
    )  # fmt: skip
    kernels = tuple(
        KernelView(f"blueprint-{b}", 1, f"{b:064x}", rng.randrange(10**5), kind, width, rng.randrange(1, 10**5))
        for b in range(num_blueprints)
        for kind in LayerKind
        for width in WIDTHS
        if rng.random() < 0.9
    )
    num_edges = 2 * num_layers if num_layers > 1 else 0
    edges = tuple(sorted({tuple(rng.sample(names, 2)) for _n in range(num_edges)}))
    epochs = tuple(EpochView(n, 100 * n, {"val_accuracy": rng.random()}) for n in range(rng.randrange(9)))
    return GraphView(run_id, 1, 3, 500, len(epochs), layers, edges, seeds, epochs, kernels, planned_epochs=20)


def permuted(view: GraphView, rng: random.Random) -> GraphView:
    """The same view with its layers, seeds, edges and kernels in another order."""
    return replace(
        view,
        **{name: tuple(rng.sample(things, len(things))) for name in ("layers", "seeds", "edges", "kernels")
           if (things := getattr(view, name)) is not None},
    )  # fmt: skip
