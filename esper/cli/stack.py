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
    if stack := running_stack():
        print_line("the stack is already running")
        show(stack)
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
    if stack := running_stack():
        show(stack)
    print_line("next: `faust -A esper.streams worker --without-web`, `esper serve urza`, `esper serve tamiyo`")


def down() -> None:
    """Stop Kafka, Postgres and S3. Their data is kept for the next `esper up`."""
    stack = running_stack()
    if stack is None:
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
    """Show each part of the stack: its address, process, state and log file."""
    stack = running_stack()
    if stack is None:
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


def running_stack() -> dict[str, Any] | None:
    """The content of stack.json; None if there is no such file, or if its supervisor has ended.

    Checks the command line of the process, since the supervisor's pid may belong to another program by now.
    """
    try:
        loaded: dict[str, Any] = json.loads((state_dir() / STACK_FILE).read_text(encoding="utf-8"))
        command = psutil.Process(loaded["supervisor_pid"]).cmdline()
    except (FileNotFoundError, ValueError, psutil.Error):
        return None
    return loaded if "esper.embedded.supervisor" in command else None


def show(stack: dict[str, Any]) -> None:
    """Print a table of the parts, and below it their log files, whose paths would not fit into a row."""
    parts = stack["parts"].items()
    rows = [(name, part["address"], str(part["pid"]), _state_of(part["address"])) for name, part in parts]
    print_table(new_table("part", "address", "pid", "state", rows=rows))
    for name, part in parts:
        print_line(f"log of {name}: {part['log']}")


def _state_of(address: str) -> str:
    return "ready" if is_listening(int(address.rsplit(":", 1)[1])) else "[red]not answering[/red]"


def _data_folder(folder: Path) -> Path:
    """The data folder: inside the state folder, or, for root, a folder that Postgres' unprivileged user can access."""
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
