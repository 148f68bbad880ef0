"""`esper migrate`, `esper projections` and `esper why`: the rows that are folded from the log."""

import asyncio

import typer
from rich.console import Console
from rich.table import Table

from esper.config import Settings, load_settings
from esper.errors import ConfigError
from esper.streams.causes import Cause, why
from esper.streams.database import connect_pool
from esper.streams.lag import TopicLag, lags
from esper.streams.migrations import migrate as run_migrations
from esper.streams.replay import TableComparison
from esper.streams.replay import rebuild as run_rebuild
from esper.streams.replay import verify as run_verify

EXIT_DIFFERENT = 1
EXIT_UNKNOWN = 1


def register(app: typer.Typer) -> None:
    """Add the commands."""
    projections = typer.Typer(no_args_is_help=True, help="The rows that are folded from the log.")
    projections.command()(rebuild)
    projections.command()(verify)
    projections.command()(status)
    app.add_typer(projections, name="projections")
    app.command()(migrate)
    app.command("why")(show_why)


def migrate() -> None:
    """Bring the database's schema to the newest form."""
    applied = run_migrations(load_settings().need_postgres())
    typer.echo(f"applied: {', '.join(applied)}" if applied else "nothing to apply")


def rebuild() -> None:
    """Fold the log anew, as far as workers have read it, beside the live rows, then swap. Workers may go on."""
    settings, console = load_settings(), Console()
    with console.status("folding the log") as shown:
        count = asyncio.run(run_rebuild(settings, lambda t, n: shown.update(f"{n:,} records; {t}")))
    console.print(f"rebuilt from {count:,} records; what no worker had read yet is a worker's to fold")


def verify() -> None:
    """Fold the log into a schema of its own and compare it with the live rows, table by table."""
    settings, console = load_settings(), Console()
    with console.status("folding the log") as shown:
        found = asyncio.run(run_verify(settings, lambda t, n: shown.update(f"{n:,} records; {t}")))
    console.print(_comparison_table(found))
    different = [c.table for c in found if not c.is_equal]
    if different:
        console.print(f"[red]live rows differ from the log in: {', '.join(different)}[/red]")
        console.print("`esper projections rebuild` folds them anew from the log")
        raise typer.Exit(EXIT_DIFFERENT)
    console.print("live and rebuilt are equal")


def status() -> None:
    """How far each topic is folded."""
    Console().print(lag_table(asyncio.run(_lags(load_settings()))))


def show_why(
    run: str = typer.Argument(..., help="The run's id."),
    seed: str = typer.Argument(..., help="LAYER:SEED, e.g. fc1:0."),
) -> None:
    """Print the chain of causes of a seed: decision, command, lifecycle, field report."""
    layer_id, separator, number = seed.rpartition(":")
    if not separator or not number.isdigit():
        raise ConfigError(f"{seed!r} is no seed: write LAYER:SEED, e.g. fc1:0")
    causes = asyncio.run(_why(load_settings(), run, layer_id, int(number)))
    if not causes:
        typer.echo(f"nothing ever happened to seed {seed} of run {run}; `esper events tail` shows what did")
        raise typer.Exit(EXIT_UNKNOWN)
    Console().print(cause_table(causes))


def lag_table(found: list[TopicLag]) -> Table:
    """Topics with records and lag; dead letters only where there are some."""
    table = Table("topic", "records", "not folded yet")
    for topic in found:
        if topic.lag is not None or topic.num_records:
            table.add_row(topic.topic, f"{topic.num_records:,}", "-" if topic.lag is None else f"{topic.lag:,}")
    return table


def cause_table(causes: list[Cause]) -> Table:
    """The chain, a link a row."""
    table = Table("time", "step", "what", "why", box=None, padding=(0, 1))
    for cause in causes:
        table.add_row(f"{cause.at:%H:%M:%S}", f"{cause.step:,}", cause.kind, cause.told)
    return table


def _comparison_table(found: list[TableComparison]) -> Table:
    table = Table("table", "rows live", "rows rebuilt", "")
    for c in found:
        table.add_row(c.table, f"{c.live[0]:,}", f"{c.rebuilt[0]:,}", "equal" if c.is_equal else "DIFFERENT")
    return table


async def _lags(settings: Settings) -> list[TopicLag]:
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        return await lags(connection, settings.need_kafka())


async def _why(settings: Settings, run: str, layer_id: str, seed_id: int) -> list[Cause]:
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        return await why(connection, run, layer_id, seed_id)
