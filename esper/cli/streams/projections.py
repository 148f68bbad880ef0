"""`esper projections` and `esper migrate`: the tables in Postgres that workers derive from the log."""

import asyncio

import typer
from rich.markup import escape

from esper.cli.command_group import Commands, add_group
from esper.cli.streams.projection_status import print_status
from esper.cli.streams.replay_progress import QUIET, print_comparison, replay_progress
from esper.cli.terminal import EXIT_ERROR, new_table, print_line, print_table, run_or_exit
from esper.config import Settings, load_settings
from esper.errors import ConfigError
from esper.streams.database.migrations import migrate as run_migrations
from esper.streams.replay import (
    ComparisonOptions,
    Cutoff,
    RebuildResult,
    create_snapshot,
    drop_snapshot,
    list_snapshots,
)
from esper.streams.replay import rebuild as run_rebuild
from esper.streams.replay import verify as run_verify


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(migrate)
    commands: Commands = {"status": print_status, "verify": verify, "rebuild": rebuild, "list": list_all, "drop": drop}
    add_group(app, "projections", "Inspect, verify and rebuild the tables that are projected from the log.", commands)


def migrate() -> None:
    """Apply pending database migrations."""
    applied = run_migrations(load_settings().need_postgres())
    typer.echo(f"applied: {', '.join(applied)}" if applied else "no pending migrations")


def rebuild(
    compare: bool = typer.Option(
        False, "--compare", help="Compare every table before the swap. If one differs, keep the live tables and exit 1."
    ),
    accept_changes: bool = typer.Option(False, "--accept-changes", help="With --compare: swap even if tables differ."),
    show: int = typer.Option(3, min=0, help="With --compare: number of differing rows to print for each table."),
    until: list[str] = typer.Option(
        [],
        help="Project the log up to TOPIC[PARTITION]@OFFSET (repeatable) or up to a time, into the snapshot --into.",
    ),
    into: str | None = typer.Option(None, help="Name of the snapshot to create with --until."),
    quiet: bool = QUIET,
) -> None:
    """Rebuild the tables from the log, then swap them with the live ones. Workers and readers keep running.

    With --until and --into, create a snapshot instead: the tables as they were, in a schema of that name.

    Exit codes: 0 done; 1 tables differ, nothing swapped; 2 failed, the live tables are unchanged.
    """
    settings = load_settings()
    if bool(until) != (into is not None):
        raise ConfigError("--until and --into belong together; give both to create a snapshot")
    if into is not None:
        if compare or accept_changes:
            raise ConfigError("--until creates a snapshot and swaps nothing; leave out --compare and --accept-changes")
        _create_snapshot(settings, Cutoff.parse(until), into, quiet)
        return
    if accept_changes and not compare:
        raise ConfigError("--accept-changes needs --compare")
    comparison = ComparisonOptions(show, accept_changes) if compare else None
    with replay_progress(quiet=quiet) as on_progress:
        result = run_or_exit(lambda: run_rebuild(settings, on_progress, comparison))
    if result.comparisons:
        print_comparison(list(result.comparisons))
    _print_result(result)
    if not result.is_swapped:
        raise typer.Exit(EXIT_ERROR)


def verify(
    show: int = typer.Option(3, min=0, help="Number of differing rows to print for each table."), quiet: bool = QUIET
) -> None:
    """Project the log into a temporary schema and compare it with the live tables.

    Exit codes: 0 equal; 1 different; 2 they could not be compared.
    """
    settings = load_settings()
    with replay_progress(quiet=quiet) as on_progress:
        comparisons = run_or_exit(lambda: run_verify(settings, on_progress, show))
    print_comparison(comparisons)
    different = [c.table for c in comparisons if not c.is_equal]
    if different:
        print_line(f"[red]live rows differ from the log in: {', '.join(different)}[/red]")
        print_line("`esper projections rebuild` rebuilds them")
        raise typer.Exit(EXIT_ERROR)
    print_line("live and rebuilt are equal")


def list_all() -> None:
    """List snapshots, and old tables that rebuilds have kept."""
    snapshots = asyncio.run(list_snapshots(load_settings()))
    if not snapshots:
        print_line("no snapshots; `esper projections rebuild --until TIME --into NAME` creates one")
        return
    table = new_table("schema", "content", "size", "state")
    for snapshot in snapshots:
        content = f"until {snapshot.description}" if snapshot.kind == "snapshot" else snapshot.description
        state = "complete" if snapshot.is_complete else "[red]incomplete: in progress, or killed[/red]"
        table.add_row(snapshot.schema, escape(content), f"{snapshot.num_bytes / 1e6:,.1f} MB", state)
    print_table(table)
    print_line("`esper why --schema NAME` reads a snapshot, `esper projections drop NAME` drops it")


def drop(name: str = typer.Argument(..., help="Name, as `esper projections list` prints it.")) -> None:
    """Drop a snapshot. The live tables and schemas that are not Esper's are never dropped."""
    asyncio.run(drop_snapshot(load_settings(), name))
    typer.echo(f"dropped {name}")


def _create_snapshot(settings: Settings, until: Cutoff, into: str, quiet: bool) -> None:
    with replay_progress(quiet=quiet) as on_progress:
        num_records = run_or_exit(lambda: create_snapshot(settings, until, into, on_progress))
    print_line(f"projected {num_records:,} records, until {until}, into snapshot {into}")
    print_line(f"`esper why --schema {into}` reads it; for other commands set ESPER_POSTGRES__SCHEMA_NAME={into}")


def _print_result(result: RebuildResult) -> None:
    if not result.is_swapped:
        different = ", ".join(c.table for c in result.comparisons if not c.is_equal)
        print_line(f"[red]not swapped: live rows differ from the log in: {different}[/red]")
        print_line("the live tables are unchanged; `--accept-changes` swaps anyway")
        return
    print_line(f"rebuilt from {result.num_records:,} records; workers project the records that came later")
    if result.num_carried_over:
        print_line(f"{result.num_carried_over:,} health windows began before the log does; copied from the live tables")
    if result.kept_as is not None:
        print_line(
            "[yellow]the log no longer has the events of some rows[/yellow]: the old tables are kept in schema "
            f"{result.kept_as}; `esper projections drop {result.kept_as}` drops them"
        )
    print_line(f"workers waited {result.locked_s:.2f} s")
