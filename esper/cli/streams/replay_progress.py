"""Progress of a replay: a bar on a terminal, a line every few seconds elsewhere, nothing with --quiet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from esper.cli.terminal import new_table, print_line, print_table
from esper.streams.replay import ProgressCallback, ReplayProgress, RowDifference, TableComparison
from esper.streams.replay.replay_projection import ignore_progress

LINE_INTERVAL_S = 5.0
REDRAW_INTERVAL_S = 0.1
RATE_WINDOW_S = 10.0
MAX_CELL_CHARS = 60

QUIET = typer.Option(False, "--quiet", "-q", help="Do not print progress.")


class RecordRate:
    """Records per second over the last ``RATE_WINDOW_S``."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []

    def update(self, num_records: int) -> float:
        """Add a sample and return the rate."""
        now = time.monotonic()
        self._samples.append((now, num_records))
        while len(self._samples) > 2 and now - self._samples[1][0] > RATE_WINDOW_S:
            self._samples.pop(0)
        began, num_before = self._samples[0]
        return (num_records - num_before) / (now - began) if now > began else 0.0


@contextmanager
def replay_progress(*, quiet: bool) -> Iterator[ProgressCallback]:
    """The callback that shows the progress of a replay."""
    console = Console()
    if quiet:
        yield ignore_progress
    elif console.is_terminal:
        with _progress_bar(console) as show:
            yield show
    else:
        yield _progress_lines()


@contextmanager
def _progress_bar(console: Console) -> Iterator[ProgressCallback]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} records"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    rate, drawn_at = RecordRate(), 0.0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=0, rate=0.0)

        def show(progress: ReplayProgress) -> None:
            nonlocal drawn_at
            now, done, total = time.monotonic(), progress.num_records, progress.num_expected
            if now - drawn_at >= REDRAW_INTERVAL_S or done >= total:
                drawn_at = now
                bar.update(task, description=progress.phase, completed=done, total=total, rate=rate.update(done))

        yield show


def _progress_lines() -> ProgressCallback:
    rate, last_phase, printed_at = RecordRate(), "", 0.0

    def show(progress: ReplayProgress) -> None:
        nonlocal last_phase, printed_at
        now, per_second = time.monotonic(), rate.update(progress.num_records)
        phase, _colon, _detail = progress.phase.partition(":")
        if phase != last_phase or now - printed_at >= LINE_INTERVAL_S:
            last_phase, printed_at = phase, now
            print_line(escape(progress_line(progress, per_second)))

    return show


def progress_line(progress: ReplayProgress, records_per_s: float) -> str:
    """Phase, share, records, rate and time left, as far as they are known."""
    if not progress.num_expected:
        return progress.phase
    share = 100 * progress.num_records // progress.num_expected
    text = f"{progress.phase}: {share} %, {progress.num_records:,} of {progress.num_expected:,} records"
    num_left = progress.num_expected - progress.num_records
    if records_per_s >= 1 and num_left:
        minutes, seconds = divmod(round(num_left / records_per_s), 60)
        text += f", {records_per_s:,.0f}/s, {minutes}:{seconds:02} left"
    return text


def print_comparison(comparisons: list[TableComparison]) -> None:
    """Print a row for each table, then the rows that differ."""
    rows = [
        (c.table, f"{c.live[0]:,}", f"{c.rebuilt[0]:,}", "equal" if c.is_equal else "[red]DIFFERENT[/red]")
        for c in comparisons
    ]
    print_table(new_table("table", "live rows", "rebuilt rows", "result", rows=rows))
    for c in comparisons:
        for difference in c.differences:
            _print_difference(c.table, difference)


def _print_difference(table: str, row: RowDifference) -> None:
    where = escape(f"{table} {row.key}")
    if row.live is None or row.rebuilt is None:
        problem = "in the log, not in the live table" if row.live is None else "in the live table, not in the log"
        print_line(f"{where}: {problem}")
        return
    print_line(where)
    for name in row.columns:
        live, rebuilt = _format_cell(row.live.get(name)), _format_cell(row.rebuilt.get(name))
        print_line(f"    {escape(name)}: live {live}, rebuilt {rebuilt}")


def _format_cell(text: str | None) -> str:
    if text is None:
        return "null"
    return escape(text if len(text) <= MAX_CELL_CHARS else text[:MAX_CELL_CHARS] + "...")
