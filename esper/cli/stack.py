"""`esper up | down | status`: an embedded Kafka, Postgres and S3 that keep running in the background."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import typer
from rich.console import Console

from esper.cli.terminal import new_table, print_line, print_table
from esper.config import STACK_FILE, load_settings, state_dir
from esper.embedded.processes import is_listening
from esper.errors import UnavailableError

START_TIMEOUT_S = 300.0  # the first start downloads Kafka
STOP_TIMEOUT_S = 30.0
POLL_S = 0.1


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)


def up() -> None:
    """Start Kafka, Postgres and S3 in the background and create topics and tables."""
    if is_running(read_stack()):
        print_line("the stack is already running")
        show(read_stack())
        return
    folder = state_dir()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / STACK_FILE).unlink(missing_ok=True)
    log = folder / "supervisor.log"
    with Console().status("starting Kafka, Postgres and S3"), log.open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "esper.embedded.supervisor", str(folder), str(_data_folder(folder))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _wait_for_start(supervisor, folder, log)
        prepare()
    show(read_stack())
    print_line("next: `faust -A esper.streams worker --without-web`, `esper serve urza`, `esper serve tamiyo`")


def down() -> None:
    """Stop Kafka, Postgres and S3. Their data is kept for the next `esper up`."""
    stack = read_stack()
    if stack is None or not is_running(stack):
        (state_dir() / STACK_FILE).unlink(missing_ok=True)
        typer.echo("the stack is not running")
        return
    os.kill(stack["supervisor_pid"], signal.SIGTERM)
    try:
        psutil.Process(stack["supervisor_pid"]).wait(STOP_TIMEOUT_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired as error:
        raise UnavailableError(
            f"supervisor (pid {stack['supervisor_pid']}) did not stop within {STOP_TIMEOUT_S:.0f} s; kill it"
        ) from error
    (state_dir() / STACK_FILE).unlink(missing_ok=True)
    typer.echo("stopped")


def status() -> None:
    """Show each part of the stack: its address, its process and whether it answers."""
    stack = read_stack()
    if stack is None or not is_running(stack):
        typer.echo("the stack is not running; `esper up` starts it")
        raise typer.Exit(1)
    show(stack)


def prepare() -> None:
    """Create topics and tables in the stack that the settings name."""
    from esper.oona.admin.topics import apply_topics
    from esper.streams.database.migrations import migrate

    settings = load_settings()
    asyncio.run(apply_topics(settings.need_kafka()))
    migrate(settings.need_postgres())


def read_stack() -> dict[str, Any] | None:
    """The content of stack.json; None if there is no such file."""
    try:
        loaded: dict[str, Any] = json.loads((state_dir() / STACK_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return loaded


def is_running(stack: dict[str, Any] | None) -> bool:
    """Whether the supervisor is alive. Checks its command line, since another process may have got its pid."""
    if stack is None:
        return False
    try:
        return "esper.embedded.supervisor" in psutil.Process(stack["supervisor_pid"]).cmdline()
    except psutil.Error:
        return False


def show(stack: dict[str, Any] | None) -> None:
    """Print a table of the parts."""
    table = new_table("part", "address", "pid", "state", "log")
    for name, part in (stack or {"parts": {}})["parts"].items():
        is_up = is_listening(int(part["address"].rsplit(":", 1)[1]))
        table.add_row(
            name, part["address"], str(part["pid"]), "ready" if is_up else "[red]not answering[/red]", part["log"]
        )
    print_table(table)


def _data_folder(folder: Path) -> Path:
    """The folder of the data: in the state folder, or for root in one that Postgres' user may enter."""
    if os.geteuid() != 0:
        return folder / "stack"
    pointer = folder / "data-folder"
    if pointer.exists() and Path(pointer.read_text()).is_dir():
        return Path(pointer.read_text())
    made = Path(tempfile.mkdtemp(prefix="esper-stack-", dir="/var/tmp"))
    pointer.write_text(str(made))
    return made


def _wait_for_start(supervisor: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (folder / STACK_FILE).exists():
        if supervisor.poll() is not None:
            raise UnavailableError(
                f"the stack did not start; {log} ends with:\n{log.read_text(errors='replace')[-3000:]}"
            )
        if time.monotonic() > deadline:
            supervisor.terminate()
            raise UnavailableError(f"the stack did not start within {START_TIMEOUT_S:.0f} s; see {log}")
        time.sleep(POLL_S)
