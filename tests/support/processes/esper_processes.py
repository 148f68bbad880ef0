"""Esper's processes, started as a user starts them."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from support.conditions import wait_until

from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack, inherited_environment

SCRIPTS = Path(sys.executable).parent
WORKER = (str(SCRIPTS / "faust"), "-A", "esper.streams", "worker", "--without-web")
READY_S = 120.0


def process(stack: EmbeddedStack, folder: Path, name: str, *command: str, **env: str) -> ChildProcess:
    """A process with the stack's addresses in its environment, not started yet."""
    environment = {**inherited_environment(), **stack.environment(), **env}
    return ChildProcess(name, command, env=environment, log_path=folder / f"{name}.log", cwd=folder)


def log_of(child: ChildProcess) -> str:
    """Output of a process so far."""
    return child.log_path.read_text(errors="replace") if child.log_path.exists() else ""


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes that still run; zombies do not count."""

    def lives(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [process for process in processes if lives(process)]


def command_lines() -> str:
    """Command line of every process on this machine, one for each line."""
    return "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


@contextmanager
def running(child: ChildProcess, ready_line: str) -> Iterator[ChildProcess]:
    """Start a process, wait for a line in its output, and stop it at the end."""
    child.start()
    try:
        child.wait_until_ready(lambda: ready_line in log_of(child), READY_S)
        yield child
    finally:
        child.stop()


def worker(stack: EmbeddedStack, folder: Path, name: str = "worker", **env: str) -> ChildProcess:
    """A stream worker, not started yet."""
    return process(stack, folder, name, *WORKER, **env)


def cli(stack: EmbeddedStack, folder: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Run `esper` to its end. Returns its exit code and output."""
    child = process(
        stack, folder, "-".join(("esper", *arguments[:2])).replace("/", "_"), str(SCRIPTS / "esper"), *arguments, **env
    )
    child.log_path.unlink(missing_ok=True)
    child.start()
    wait_until(lambda: not child.is_alive, 170, f"the end of esper {' '.join(arguments)}")
    return child.returncode or 0, log_of(child)
