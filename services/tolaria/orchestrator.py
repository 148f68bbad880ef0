"""Starts Esper's services (oona, urza, tamiyo) in order, and restarts those that die.

Owns the child processes, not what they do. Invariant: a service starts only when the one before it is ready, and none
outlives the orchestrator, however that ends.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from esper.embedded.processes import ChildProcess
from esper.errors import UnavailableError
from esper.logging import get_logger

START_TIMEOUT_S = 90.0  # then starting a service fails
HEALTH_INTERVAL_S = 10.0  # how long a dead service can go unnoticed
MAX_RESTARTS = 5  # of one service; then it stays down, as `health` shows
POLL_S = 0.1

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One service: the command that starts it, and the text in its log once it is ready."""

    name: str
    command: tuple[str, ...]
    ready_text: str


def standard_services() -> tuple[ServiceSpec, ...]:
    """The services of a stack, each after those that it depends on."""
    scripts = Path(sys.executable).parent
    esper = str(scripts / "esper")
    worker = (str(scripts / "faust"), "-A", "esper.streams", "worker", "--without-web")
    return (
        ServiceSpec("oona", worker, "worker.ready"),
        ServiceSpec("urza", (esper, "serve", "urza"), "urza.ready"),
        ServiceSpec("tamiyo", (esper, "serve", "tamiyo"), "tamiyo.ready"),
    )


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """The state of a service."""

    name: str
    is_alive: bool
    num_restarts: int
    log: Path


class Orchestrator:
    """Context manager around the services of one stack.

    Args:
        services: in start order; they stop in reverse order.
        environment: the ESPER_ variables with the addresses of the stack.
        log_folder: gets one file per service.
        report: called with a short text before each service starts.
    """

    def __init__(
        self,
        services: tuple[ServiceSpec, ...],
        environment: Mapping[str, str],
        log_folder: Path,
        report: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._specs = services
        self._environment = {**os.environ, **environment}
        self._log_folder = log_folder
        self._report = report
        self._children: dict[str, ChildProcess] = {}
        self._restarts = dict.fromkeys((s.name for s in services), 0)
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._watch_health, name="orchestrator", daemon=True)
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for spec in self._specs:
                self._report(f"starting {spec.name}")
                undo.callback(self._stop, spec.name)
                self._start(spec)
                self._wait_until_ready(spec)
            self._exits = undo.pop_all()
        self._watch.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._watch.join()
        self._exits.close()

    def health(self) -> tuple[ServiceHealth, ...]:
        """The current state of each service."""
        return tuple(
            ServiceHealth(s.name, self._children[s.name].is_alive, self._restarts[s.name], self.log_of(s.name))
            for s in self._specs
        )

    def child(self, name: str) -> ChildProcess:
        """The process of a service."""
        return self._children[name]

    def log_of(self, name: str) -> Path:
        """The file with the output of a service."""
        return self._log_folder / f"{name}.log"

    def _start(self, spec: ServiceSpec) -> None:
        child = ChildProcess(spec.name, list(spec.command), env=self._environment, log_path=self.log_of(spec.name))
        child.start()
        self._children[spec.name] = child

    def _stop(self, name: str) -> None:
        if name in self._children:
            self._children[name].stop()

    def _wait_until_ready(self, spec: ServiceSpec) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while spec.ready_text not in self._log_text(spec.name):
            if not self._children[spec.name].is_alive:
                raise UnavailableError(
                    f"{spec.name} exited while starting; its log ({self.log_of(spec.name)}) ends with:\n"
                    f"{self._log_tail(spec.name)}"
                )
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{spec.name} is not ready after {START_TIMEOUT_S:.0f} s; its log "
                    f"({self.log_of(spec.name)}) ends with:\n{self._log_tail(spec.name)}"
                )
            self._stopping.wait(POLL_S)

    def _watch_health(self) -> None:
        while not self._stopping.wait(HEALTH_INTERVAL_S):
            for spec in self._specs:
                if not self._children[spec.name].is_alive and self._restarts[spec.name] < MAX_RESTARTS:
                    self._restarts[spec.name] += 1
                    _log.warning("service.restarted", service=spec.name, restarts=self._restarts[spec.name])
                    self._start(spec)

    def _log_text(self, name: str) -> str:
        path = self.log_of(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _log_tail(self, name: str, num_lines: int = 15) -> str:
        return "\n".join(self._log_text(name).splitlines()[-num_lines:])
