"""`esper projections status`: how far each topic is folded, what waits, and what stopped."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from esper.cli.streams.replay_progress import EXIT_TROUBLE, run_with_progress
from esper.config import load_settings
from esper.schemas.topics import TOPICS
from esper.streams.read_models.projection_status import DeadLetterCounts, PartitionStatus, ProjectionStatus, projection_status

EXIT_RED = 1
EXIT_AWAY = EXIT_TROUBLE
MAX_SHOWN = 10

Rates = Mapping[str, float]
"""Topic -> records folded a second."""


def show_status(
    watch: float | None = typer.Option(None, min=0.5, help="Look again every so many seconds, and show rates."),
    partitions: bool = typer.Option(False, "--partitions", help="A row for each partition that has records."),
    as_json: bool = typer.Option(False, "--json", help="For machines: one line of JSON a look."),
) -> None:
    """How far each topic is folded, what waits, and what stopped.

    Exit code 0: all is well, or only behind. 1: a partition stopped. 2: Kafka or Postgres is away (what the other one
    says is shown), or refuses this user.
    """
    settings, console = load_settings(), Console()
    seen = run_with_progress(lambda: projection_status(settings))
    if watch is None:
        _show(console, seen, {}, partitions, as_json)
        if seen.log_trouble or seen.rows_trouble:
            raise typer.Exit(EXIT_AWAY)
        if seen.red:
            raise typer.Exit(EXIT_RED)
        return
    rates: Rates = {}
    seen_at = time.monotonic()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            if as_json or not console.is_terminal:
                _show(console, seen, rates, partitions, as_json)
            else:
                live.update(status_table(seen, rates, partitions), refresh=True)
            time.sleep(watch)
            before, before_at = seen, seen_at
            seen, seen_at = run_with_progress(lambda: projection_status(settings)), time.monotonic()
            rates = _rates(before, seen, seen_at - before_at)


def status_table(seen: ProjectionStatus, rates: Rates, by_partition: bool) -> Table:
    """Topics, or their partitions; a cell is empty where nothing is known or nothing is there."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("topic", no_wrap=True)
    has_letters = any(seen.letters.values())
    counted = ("dead", "pending", "refused") if has_letters else ()
    for name in ("records", "folded", "left", "oldest", *counted, *(("folded/s",) if rates else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for spec in TOPICS:
        mine = [p for p in seen.partitions if p.topic == spec.name]
        letters = seen.letters.get(spec.name, DeadLetterCounts())
        counts = (letters.num_dead, letters.num_pending, letters.num_refused) if has_letters else ()
        rate = (f"{rates[spec.name]:,.0f}",) if rates else ()
        table.add_row(spec.name, *_cells(mine, seen), *(f"{c:,}" if c else "" for c in counts), *rate, _state(mine))
        if by_partition:
            blank = ("",) * (len(counts) + len(rate))
            for p in mine:
                if p.num_records or p.position:
                    table.add_row(f"  [{p.partition}]".replace("[", "\\["), *_cells([p], seen), *blank, _state([p]))
    return table


def _state(mine: list[PartitionStatus]) -> str:
    num_red = sum(p.red is not None for p in mine)
    return f"[red]{num_red} stopped[/red]" if num_red else ""


def _show(console: Console, seen: ProjectionStatus, rates: Rates, by_partition: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_as_dict(seen, rates), sort_keys=True))
        return
    if seen.log_trouble:
        console.print(f"[red]the log is not known[/red]: {escape(seen.log_trouble)}", highlight=False)
    if seen.rows_trouble:
        console.print(f"[red]what is folded is not known[/red]: {escape(seen.rows_trouble)}", highlight=False)
    console.print(status_table(seen, rates, by_partition))
    _show_first(console, "stopped", [p.red or "" for p in seen.red])
    _show_first(
        console, "letter refused", [f"{r.topic}[{r.partition}] offset {r.offset}: {r.why}" for r in seen.refused]
    )


def _show_first(console: Console, what: str, lines: list[str]) -> None:
    for line in lines[:MAX_SHOWN]:
        console.print(f"[red]{what}[/red]: {escape(line)}", highlight=False, soft_wrap=True)
    if len(lines) > MAX_SHOWN:
        console.print(f"... and {len(lines) - MAX_SHOWN} more; --json has them all", highlight=False)


def _cells(mine: list[PartitionStatus], seen: ProjectionStatus) -> tuple[str, ...]:
    """Records, folded, not folded, the age of the oldest that waits."""
    records = "" if seen.log_trouble else f"{sum(p.num_records or 0 for p in mine):,}"
    if seen.rows_trouble:
        return records, "", "", ""
    if seen.log_trouble:
        return records, f"to {sum(p.position or 0 for p in mine):,}", "", ""
    lag = sum(p.lag or 0 for p in mine)
    folded = sum((p.num_records or 0) - (p.lag or 0) for p in mine)
    ages = [p.oldest_age_s for p in mine if p.oldest_age_s is not None]
    return records, f"{folded:,}", f"{lag:,}" if lag else "", f"{max(ages):,.0f} s" if ages else ""


def _rates(before: ProjectionStatus, after: ProjectionStatus, spent_s: float) -> Rates:
    if before.rows_trouble or after.rows_trouble:
        return {}
    known = {(p.topic, p.partition): p.position for p in before.partitions}
    rates = dict.fromkeys((t.name for t in TOPICS), 0.0)
    for p in after.partitions:
        was = known.get((p.topic, p.partition))
        if p.position is not None:
            rates[p.topic] += max(0, p.position - (was if was is not None else p.first or 0)) / spent_s
    return rates


def _as_dict(seen: ProjectionStatus, rates: Rates) -> dict[str, object]:
    topics = []
    for spec in TOPICS:
        mine = [p for p in seen.partitions if p.topic == spec.name]
        ages = [p.oldest_age_s for p in mine if p.oldest_age_s is not None]
        is_known = seen.log_trouble is None and seen.rows_trouble is None
        letters = None if seen.rows_trouble else asdict(seen.letters.get(spec.name, DeadLetterCounts()))
        topics.append(
            {
                "topic": spec.name,
                "num_records": None if seen.log_trouble else sum(p.num_records or 0 for p in mine),
                "lag": sum(p.lag or 0 for p in mine) if is_known else None,
                "oldest_age_s": max(ages, default=None),
                "letters": letters,
                "rate": rates.get(spec.name),
                "partitions": [{**asdict(p), "lag": p.lag if is_known else None} for p in mine],
            }
        )
    return {
        "topics": topics,
        "red": [asdict(p) for p in seen.red],
        "refused": [asdict(r) for r in seen.refused],
        "log_trouble": seen.log_trouble,
        "rows_trouble": seen.rows_trouble,
    }
