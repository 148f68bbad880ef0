"""Output and input of commands: lines, tables, JSON, progress bars, errors and passwords.

This module owns the formats; each command owns its content. Invariant: no printed error holds a secret.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from esper.errors import ConfigError, EsperError
from esper.redaction import mask_text

EXIT_ERROR = 1
EXIT_FAILED = 2  # as with diff and grep: 1 is a negative answer, 2 means no answer
EXIT_INTERRUPTED = 130

T = TypeVar("T")


def print_line(text: str) -> None:
    """Print text with Rich markup. Lines are never wrapped, so that they can be searched and copied."""
    Console().print(text, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal allows."""
    Console().print(table)


def print_json(value: object) -> None:
    """Print indented JSON; times are in ISO 8601."""
    typer.echo(json.dumps(value, indent=2, default=lambda v: v.isoformat() if isinstance(v, datetime) else str(v)))


def print_error(message: str) -> None:
    """Print a message on stderr, its secrets masked."""
    print(f"esper: {mask_text(message)}", file=sys.stderr)  # noqa: T201


def new_table(
    *columns: str, numbers: Sequence[str] = (), title: str | None = None, rows: Iterable[Sequence[str]] = ()
) -> Table:
    """A table. Columns named in ``numbers`` come last and are aligned to the right.

    Cells wrap and are never truncated, so that paths and digests can be copied.
    """
    table = Table(title=title, title_justify="left")
    for position, name in enumerate(columns):
        table.add_column(name, no_wrap=position == 0, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def format_time(at: datetime) -> str:
    """Date and time to the second."""
    return f"{at:%Y-%m-%d %H:%M:%S}"


def format_interval(value: float, low: float | None, high: float | None, form: str) -> str:
    """A value and its interval, ``0.912 (0.905 to 0.920)``; without bounds the value alone."""
    if low is None or high is None:
        return form.format(value)
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)})"


def run_or_exit(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine and return its result. An ``EsperError`` ends the process with ``EXIT_FAILED``."""
    try:
        return asyncio.run(work())
    except EsperError as error:
        print_error(str(error))
        raise typer.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        print_error("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def read_password() -> SecretStr:
    """The password typed at the prompt, or the first line of stdin where stdin is not a terminal.

    Raises:
        ConfigError: the first line of stdin is empty.
    """
    if sys.stdin.isatty():
        return SecretStr(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
    line = sys.stdin.readline().rstrip("\n")
    if not line:
        raise ConfigError("stdin: its first line is empty; write the password there, or run this in a terminal")
    return SecretStr(line)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr if that is a terminal; stdout holds only results.

    Yields a function that takes the number done and the total number.
    """
    console = Console(stderr=True)
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
