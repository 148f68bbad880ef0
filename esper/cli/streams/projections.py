"""`esper migrate`, `esper projections` and `esper why`: the rows that are folded from the log."""

import asyncio

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper.cli.streams.projection_status import show_status
from esper.cli.streams.replay_progress import run_with_progress, show_comparison, shown
from esper.config import PostgresSettings, Settings, load_settings
from esper.errors import ConfigError
from esper.streams.database.connections import connect_pool
from esper.streams.database.migrations import migrate as run_migrations
from esper.streams.read_models.projection_status import TopicLag
from esper.streams.read_models.seed_causes import Cause, causes_of_seed
from esper.streams.replay import ComparisonOptions, RebuildResult, Cutoff, create_snapshot, drop_snapshot, list_snapshots
from esper.streams.replay import rebuild as run_rebuild
from esper.streams.replay import verify as run_verify

EXIT_DIFFERENT = 1
EXIT_UNKNOWN = 1

_QUIET = typer.Option(False, "--quiet", "-q", help="Show no progress.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    projections = typer.Typer(no_args_is_help=True, help="The rows that are folded from the log.")
    projections.command()(rebuild)
    projections.command()(verify)
    projections.command("status")(show_status)
    projections.command("list")(list_pasts)
    projections.command("drop")(drop)
    app.add_typer(projections, name="projections")
    app.command()(migrate)
    app.command("why")(show_why)


def migrate() -> None:
    """Bring the database's schema to the newest form."""
    applied = run_migrations(load_settings().need_postgres())
    typer.echo(f"applied: {', '.join(applied)}" if applied else "nothing to apply")


def rebuild(
    compare: bool = typer.Option(
        False, "--compare", help="Compare every table before the swap; where one differs, swap nothing and exit with 1."
    ),
    accept_changes: bool = typer.Option(False, "--accept-changes", help="With --compare: swap all the same."),
    show: int = typer.Option(3, min=0, help="With --compare: show so many differing rows of a table."),
    until: list[str] = typer.Option(
        [],
        help="Fold only up to TOPIC[PARTITION]@OFFSET (may be given again) or up to a time, into the schema of --into.",
    ),
    into: str | None = typer.Option(None, help="The schema for --until; it stays, beside the live one."),
    quiet: bool = _QUIET,
) -> None:
    """Fold the log anew beside the live rows, as far as workers have read it, then swap. Workers and readers may go on.

    Exit code 0: swapped. 1: a table differs, nothing was swapped. 2: it could not be done, and live is as it was.
    """
    settings, console = load_settings(), Console()
    if bool(until) != (into is not None):
        raise ConfigError("--until and --into go together: the past is folded into a schema of its own")
    if into is not None:
        if compare or accept_changes:
            raise ConfigError("--until folds beside the live rows and swaps nothing: leave --compare away")
        _fold_past(settings, console, Cutoff.parse(until), into, quiet)
        return
    if accept_changes and not compare:
        raise ConfigError("--accept-changes goes with --compare")
    comparison = ComparisonOptions(show, accept_changes) if compare else None
    with shown(console, quiet=quiet) as tell:
        done = run_with_progress(lambda: run_rebuild(settings, tell, comparison))
    if done.comparisons:
        show_comparison(console, list(done.comparisons))
    _tell_rebuilt(console, done)
    if not done.is_swapped:
        raise typer.Exit(EXIT_DIFFERENT)


def verify(
    show: int = typer.Option(3, min=0, help="Show so many differing rows of a table."), quiet: bool = _QUIET
) -> None:
    """Fold the log into a schema of its own and compare it with the live rows, table by table.

    Exit code 0: equal. 1: different. 2: they could not be compared.
    """
    settings, console = load_settings(), Console()
    with shown(console, quiet=quiet) as tell:
        found = run_with_progress(lambda: run_verify(settings, tell, show))
    show_comparison(console, found)
    different = [c.table for c in found if not c.is_equal]
    if different:
        console.print(f"[red]live rows differ from the log in: {', '.join(different)}[/red]")
        console.print("`esper projections rebuild` folds them anew from the log")
        raise typer.Exit(EXIT_DIFFERENT)
    console.print("live and rebuilt are equal")


def list_pasts() -> None:
    """List the pasts that were folded beside the live rows, and what rebuilds kept."""
    found = asyncio.run(list_snapshots(load_settings()))
    console = Console()
    if not found:
        console.print("no pasts; `esper projections rebuild --until TIME --into NAME` folds one")
        return
    table = Table("schema", "what", "size", "")
    for past in found:
        what = f"until {past.told}" if past.kind == "past" else past.told
        state = "" if past.is_complete else "[red]incomplete: it was killed, or is being folded[/red]"
        table.add_row(past.schema, escape(what), f"{past.num_bytes / 1e6:,.1f} MB", state)
    console.print(table)
    console.print("`esper why --schema NAME` asks one, `esper projections drop NAME` drops it")


def drop(name: str = typer.Argument(..., help="As `esper projections list` has it.")) -> None:
    """Drop a past. The live rows, and schemas that are not Esper's, are never dropped."""
    asyncio.run(drop_snapshot(load_settings(), name))
    typer.echo(f"dropped {name}")


def show_why(
    run: str = typer.Argument(..., help="The run's id."),
    seed: str = typer.Argument(..., help="LAYER:SEED, e.g. fc1:0."),
    schema: str | None = typer.Option(None, help="Ask a past (`esper projections list`), not the live rows."),
) -> None:
    """Print the chain of causes of a seed: decision, command, lifecycle, field report."""
    layer_id, separator, number = seed.rpartition(":")
    if not separator or not number.isdigit():
        raise ConfigError(f"{seed!r} is no seed: write LAYER:SEED, e.g. fc1:0")
    causes = asyncio.run(_why(load_settings().need_postgres(), schema, run, layer_id, int(number)))
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


def _fold_past(settings: Settings, console: Console, until: Cutoff, into: str, quiet: bool) -> None:
    with shown(console, quiet=quiet) as tell:
        count = run_with_progress(lambda: create_snapshot(settings, until, into, tell))
    console.print(f"folded {count:,} records, until {until}, into schema {into}", highlight=False, soft_wrap=True)
    console.print(f"`esper why --schema {into}` asks it; with ESPER_POSTGRES__SCHEMA_NAME={into} everything else does")


def _tell_rebuilt(console: Console, done: RebuildResult) -> None:
    if not done.is_swapped:
        different = ", ".join(c.table for c in done.comparisons if not c.is_equal)
        console.print(f"[red]not swapped: the log says something else in: {different}[/red]")
        console.print("the live rows are as they were; `--accept-changes` swaps all the same")
        return
    console.print(
        f"rebuilt from {done.num_records:,} records; what no worker had read yet is a worker's to fold", soft_wrap=True
    )
    if done.num_carried_over:
        console.print(
            f"{done.num_carried_over:,} health windows began before the log does: taken over as they were", soft_wrap=True
        )
    if done.kept_as is not None:
        console.print(
            "[yellow]the log cannot give all rows again[/yellow]: those from before are kept in schema "
            f"{done.kept_as}; `esper projections drop {done.kept_as}` drops them",
            soft_wrap=True,
        )
    console.print(f"workers waited for {done.locked_s:.2f} s", highlight=False)


async def _why(postgres: PostgresSettings, schema: str | None, run: str, layer_id: str, seed_id: int) -> list[Cause]:
    async with connect_pool(postgres, schema) as pool, pool.acquire() as connection:
        return await causes_of_seed(connection, run, layer_id, seed_id)
