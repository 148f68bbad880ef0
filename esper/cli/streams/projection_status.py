"""`esper projections status`: how far each topic is projected, what lags, and which partitions stopped."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from esper.cli.terminal import EXIT_ERROR, EXIT_FAILED, new_table, print_line, print_table, run_or_exit
from esper.config import load_settings
from esper.schemas.topics import TOPICS
from esper.streams.read_models.projection_status import (
    DeadLetterCounts,
    PartitionStatus,
    ProjectionStatus,
    TopicLag,
    projection_status,
)

MAX_LINES = 10

Rates = Mapping[str, float]
"""Records projected per second, by topic."""


def print_status(
    watch: float | None = typer.Option(None, min=0.5, help="Refresh at this interval in seconds, and show rates."),
    partitions: bool = typer.Option(False, "--partitions", help="Add a row for each partition that has records."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON, one line for each refresh."),
) -> None:
    """Show how far each topic is projected, what lags, and which partitions stopped.

    Exit codes: 0 no partition stopped; 1 a partition stopped; 2 Kafka or Postgres is away or refuses this user.
    """
    settings, console = load_settings(), Console()
    status = run_or_exit(lambda: projection_status(settings))
    if watch is None:
        _print_status(status, {}, partitions, as_json)
        if status.kafka_error or status.postgres_error:
            raise typer.Exit(EXIT_FAILED)
        if status.stopped:
            raise typer.Exit(EXIT_ERROR)
        return
    rates: Rates = {}
    read_at = time.monotonic()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            if as_json or not console.is_terminal:
                _print_status(status, rates, partitions, as_json)
            else:
                live.update(_status_table(status, rates, partitions), refresh=True)
            time.sleep(watch)
            before, before_at = status, read_at
            status, read_at = run_or_exit(lambda: projection_status(settings)), time.monotonic()
            rates = _rates(before, status, read_at - before_at)


def lag_table(lags: list[TopicLag]) -> Table:
    """Topics with records, and dead letters if there are any."""
    table = new_table("topic", numbers=("events", "lag"))
    for topic in lags:
        if topic.lag is not None or topic.num_records:
            table.add_row(topic.topic, f"{topic.num_records:,}", "-" if topic.lag is None else f"{topic.lag:,}")
    return table


def _status_table(status: ProjectionStatus, rates: Rates, by_partition: bool) -> Table:
    """A row for each topic or partition. A cell is empty if its value is unknown or zero."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("topic", no_wrap=True)
    has_dead_letters = any(status.dead_letters.values())
    counted = ("dead", "pending", "refused") if has_dead_letters else ()
    for name in ("records", "projected", "lag", "oldest", *counted, *(("projected/s",) if rates else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state")
    for spec in TOPICS:
        mine = [p for p in status.partitions if p.topic == spec.name]
        dead = status.dead_letters.get(spec.name, DeadLetterCounts())
        counts = (dead.num_dead, dead.num_pending, dead.num_refused) if has_dead_letters else ()
        rate = (f"{rates[spec.name]:,.0f}",) if rates else ()
        table.add_row(spec.name, *_cells(mine, status), *(f"{c:,}" if c else "" for c in counts), *rate, _state(mine))
        if by_partition:
            blank = ("",) * (len(counts) + len(rate))
            for p in mine:
                if p.num_records or p.position:
                    name = f"  [{p.partition}]".replace("[", "\\[")
                    table.add_row(name, *_cells([p], status), *blank, _state([p]))
    return table


def _state(mine: list[PartitionStatus]) -> str:
    num_stopped = sum(p.stop_reason is not None for p in mine)
    return f"[red]{num_stopped} stopped[/red]" if num_stopped else ""


def _print_status(status: ProjectionStatus, rates: Rates, by_partition: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_as_dict(status, rates), sort_keys=True))
        return
    if status.kafka_error:
        print_line(f"[red]Kafka is unavailable[/red]: {escape(status.kafka_error)}")
    if status.postgres_error:
        print_line(f"[red]Postgres is unavailable[/red]: {escape(status.postgres_error)}")
    print_table(_status_table(status, rates, by_partition))
    _print_first("stopped", [p.stop_reason or "" for p in status.stopped])
    refused = [f"{r.topic}[{r.partition}] offset {r.offset}: {r.reason}" for r in status.refused]
    _print_first("dead letter refused by Kafka", refused)


def _print_first(what: str, lines: list[str]) -> None:
    for line in lines[:MAX_LINES]:
        print_line(f"[red]{what}[/red]: {escape(line)}")
    if len(lines) > MAX_LINES:
        print_line(f"... and {len(lines) - MAX_LINES} more; `--json` has all")


def _cells(mine: list[PartitionStatus], status: ProjectionStatus) -> tuple[str, ...]:
    """Records, projected records, lag, and the age of the oldest record that is not projected.

    Without Kafka the first offset of a partition is unknown, so the position is only an upper bound of the number of
    projected records.
    """
    records = "" if status.kafka_error else f"{sum(p.num_records or 0 for p in mine):,}"
    if status.postgres_error:
        return records, "", "", ""
    if status.kafka_error:
        return records, f"up to {sum(p.position or 0 for p in mine):,}", "", ""
    lag = sum(p.lag or 0 for p in mine)
    num_projected = sum((p.num_records or 0) - (p.lag or 0) for p in mine)
    ages = [p.oldest_age_s for p in mine if p.oldest_age_s is not None]
    return records, f"{num_projected:,}", f"{lag:,}" if lag else "", f"{max(ages):,.0f} s" if ages else ""


def _rates(before: ProjectionStatus, after: ProjectionStatus, elapsed_s: float) -> Rates:
    if before.postgres_error or after.postgres_error:
        return {}
    known = {(p.topic, p.partition): p.position for p in before.partitions}
    rates = dict.fromkeys((t.name for t in TOPICS), 0.0)
    for p in after.partitions:
        was = known.get((p.topic, p.partition))
        if p.position is not None:
            rates[p.topic] += max(0, p.position - (was if was is not None else p.first or 0)) / elapsed_s
    return rates


def _as_dict(status: ProjectionStatus, rates: Rates) -> dict[str, object]:
    topics = []
    for spec in TOPICS:
        mine = [p for p in status.partitions if p.topic == spec.name]
        ages = [p.oldest_age_s for p in mine if p.oldest_age_s is not None]
        is_known = status.kafka_error is None and status.postgres_error is None
        dead_letters = None if status.postgres_error else asdict(status.dead_letters.get(spec.name, DeadLetterCounts()))
        topics.append(
            {
                "topic": spec.name,
                "num_records": None if status.kafka_error else sum(p.num_records or 0 for p in mine),
                "lag": sum(p.lag or 0 for p in mine) if is_known else None,
                "oldest_age_s": max(ages, default=None),
                "dead_letters": dead_letters,
                "rate": rates.get(spec.name),
                "partitions": [{**asdict(p), "lag": p.lag if is_known else None} for p in mine],
            }
        )
    return {
        "topics": topics,
        "stopped": [asdict(p) for p in status.stopped],
        "refused": [asdict(r) for r in status.refused],
        "kafka_error": status.kafka_error,
        "postgres_error": status.postgres_error,
    }
