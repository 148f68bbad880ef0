"""How a replay shows itself: a bar on a terminal, a line every few seconds elsewhere, nothing where it is quiet."""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from esper.errors import EsperError
from esper.redaction import mask_text
from esper.streams.replay import RowDifference, TableComparison, ProgressCallback, ReplayProgress
from esper.streams.replay.replay_projection import ignore_progress

EXIT_TROUBLE = 2  # as of diff: nothing can be said of the rows
EXIT_INTERRUPTED = 130

LINE_EVERY_S = 5.0
REDRAWN_EVERY_S = 0.1
RATE_OVER_S = 10.0  # the rate shown is that of the last few seconds, not of the whole
MAX_CELL_CHARS = 60

T = TypeVar("T")


def run_with_progress(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run it to its end. What Esper raises on purpose is one line, and the exit code of trouble."""
    try:
        return asyncio.run(work())
    except EsperError as error:
        print(f"esper: {mask_text(str(error))}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(EXIT_TROUBLE) from None
    except KeyboardInterrupt:
        print("esper: interrupted", file=sys.stderr)  # noqa: T201
        raise typer.Exit(EXIT_INTERRUPTED) from None


class Pace:
    """Records a second, over the last few seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def rate(self, num_records: int) -> float:
        """Note how many there are by now; gives the rate."""
        now = time.monotonic()
        self._seen.append((now, num_records))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_OVER_S:
            self._seen.pop(0)
        (begun, before), spent = self._seen[0], now - self._seen[0][0]
        return (num_records - before) / spent if spent > 0 and now > begun else 0.0


@contextmanager
def shown(console: Console, *, quiet: bool) -> Iterator[ProgressCallback]:
    """What to hand to a replay so that it can be watched."""
    if quiet:
        yield ignore_progress
    elif console.is_terminal:
        with _bar(console) as tell:
            yield tell
    else:
        yield _lines(console)


@contextmanager
def _bar(console: Console) -> Iterator[ProgressCallback]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} records"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    pace, drawn_at = Pace(), 0.0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=0, rate=0.0)

        def tell(told: ReplayProgress) -> None:
            nonlocal drawn_at
            now = time.monotonic()
            if now - drawn_at >= REDRAWN_EVERY_S or told.num_records >= told.num_expected:
                drawn_at = now
                rate = pace.rate(told.num_records)
                bar.update(task, description=told.phase, completed=told.num_records, total=told.num_expected, rate=rate)

        yield tell


def _lines(console: Console) -> ProgressCallback:
    pace, phase, told_at = Pace(), "", 0.0

    def tell(told: ReplayProgress) -> None:
        nonlocal phase, told_at
        now, rate = time.monotonic(), pace.rate(told.num_records)
        begun, _colon, _detail = told.phase.partition(":")
        if begun != phase or now - told_at >= LINE_EVERY_S:
            phase, told_at = begun, now
            console.print(line(told, rate), highlight=False, markup=False, soft_wrap=True)

    return tell


def line(told: ReplayProgress, rate: float) -> str:
    """One line: the phase, the share, the records, the rate, the time left; what is not known yet is left out."""
    if not told.num_expected:
        return told.phase
    share = 100 * told.num_records // told.num_expected
    text = f"{told.phase}: {share} %, {told.num_records:,} of {told.num_expected:,} records"
    left = told.num_expected - told.num_records
    if rate >= 1 and left:
        minutes, seconds = divmod(round(left / rate), 60)
        text += f", {rate:,.0f}/s, {minutes}:{seconds:02} left"
    return text


def show_comparison(console: Console, found: list[TableComparison]) -> None:
    """The tables, then the rows that were found to differ."""
    table = Table("table", "rows live", "rows rebuilt", "")
    for c in found:
        table.add_row(c.table, f"{c.live[0]:,}", f"{c.rebuilt[0]:,}", "equal" if c.is_equal else "[red]DIFFERENT[/red]")
    console.print(table)
    for c in found:
        for difference in c.differences:
            _show_row(console, c.table, difference)


def _show_row(console: Console, table: str, row: RowDifference) -> None:
    where = f"{table} {row.key}"
    if row.live is None or row.rebuilt is None:
        lacking = "only rebuilt from the log, not live" if row.live is None else "only live, not rebuilt from the log"
        console.print(f"{escape(where)}: {lacking}", highlight=False, soft_wrap=True)
        return
    console.print(escape(where), highlight=False, soft_wrap=True)
    for name in row.columns:
        live, rebuilt = _cell(row.live.get(name)), _cell(row.rebuilt.get(name))
        console.print(f"    {escape(name)}: live {live}, by the log {rebuilt}", highlight=False, soft_wrap=True)


def _cell(text: str | None) -> str:
    if text is None:
        return "null"
    return escape(text if len(text) <= MAX_CELL_CHARS else text[:MAX_CELL_CHARS] + "...")
