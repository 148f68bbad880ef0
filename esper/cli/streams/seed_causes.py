"""`esper why`: explains what happened to one seed, from decision to field report."""

import asyncio

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli.database import database_connection
from esper.cli.terminal import EXIT_ERROR, print_table
from esper.errors import ConfigError
from esper.streams.read_models.seed_causes import Cause, causes_of_seed


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("why")(explain_seed)


def explain_seed(
    run: str = typer.Argument(..., help="Run id."),
    seed: str = typer.Argument(..., help="Seed as LAYER:NUMBER, e.g. fc1:0."),
    schema: str | None = typer.Option(None, help="Read this snapshot (`esper projections list`), not the live tables."),
) -> None:
    """Explain what happened to a seed: decisions, commands, stage changes and field reports."""
    layer_id, separator, number = seed.rpartition(":")
    if not separator or not number.isdigit():
        raise ConfigError(f"{seed!r} is not a seed; write LAYER:NUMBER, e.g. fc1:0")
    causes = asyncio.run(_read_causes(schema, run, layer_id, int(number)))
    if not causes:
        typer.echo(f"no events for seed {seed} of run {run}; `esper events tail` shows what the log has")
        raise typer.Exit(EXIT_ERROR)
    print_table(cause_table(causes))


def cause_table(causes: list[Cause]) -> Table:
    """The chain of causes, one link a row."""
    table = Table("time", "step", "event", "details", box=None, padding=(0, 1))
    for cause in causes:
        table.add_row(f"{cause.at:%H:%M:%S}", f"{cause.step:,}", cause.kind, escape(cause.description))
    return table


async def _read_causes(schema: str | None, run: str, layer_id: str, seed_id: int) -> list[Cause]:
    async with database_connection(schema) as connection:
        return await causes_of_seed(connection, run, layer_id, seed_id)
