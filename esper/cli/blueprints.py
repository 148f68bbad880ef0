"""`esper blueprints`: what can grow, and what it costs in a layer of a given kind and width."""

import typer
from rich.console import Console
from rich.table import Table

from esper.errors import KernelError
from esper.kasmina.catalogue import CATALOGUE, cost_of
from esper.schemas.enums import LayerKind
from esper.services.urza.catalogue import SHIPPED


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(blueprints)


def blueprints(
    features: int = typer.Option(64, min=1, help="The layer's output features (channels)."),
    kind: LayerKind = typer.Option(LayerKind.LINEAR, help="The kind of layer."),
    positions: int = typer.Option(
        1, min=1, help="Positions of one sample: vectors of a linear layer, length or height x width of a convolution."
    ),
) -> None:
    """Show the blueprints that Esper ships for a layer: parameters, and FLOPs of one forward pass of one sample."""
    table = Table(title=f"{kind}, {features} features, {positions} position(s)", title_justify="left")
    for name in ("blueprint", "s(h)"):
        table.add_column(name, no_wrap=name == "blueprint")
    for name in ("parameters", "FLOPs", "widest / h"):
        table.add_column(name, justify="right")
    for blueprint_id, spec in SHIPPED.items():
        if kind not in spec.targets:
            continue
        equation = CATALOGUE[spec.module].equation
        try:
            cost = cost_of(spec, kind, features)
        except KernelError as error:
            table.add_row(blueprint_id, f"refused: {error}", "-", "-", "-")
            continue
        widening = f"{cost.hidden_features / features:.3g}"
        table.add_row(blueprint_id, equation, f"{cost.num_parameters:,}", f"{cost.flops(positions):,}", widening)
    console = Console()
    console.print(table)
    console.print("FLOPs: two for each multiply-add of a matrix product or convolution; docs/kernels.md has the rest.")
