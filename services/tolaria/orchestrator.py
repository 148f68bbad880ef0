"""Starts Esper's services (oona, urza, tamiyo) in order, and restarts those that die.

Owns the child processes, not what they do. Invariant: a service starts only when the one before it is ready, and none
outlives the orchestrator, however that ends.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from esper.embedded.processes import ChildProcess
from esper.logging import get_logger

START_TIMEOUT_S = 90.0  # then starting a service fails
HEALTH_INTERVAL_S = 10.0  # how long a dead service can go unnoticed
MAX_RESTARTS = 5  # of one service; then it stays down, as `health` shows

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
        self._report = report
        self._children = {
            s.name: ChildProcess(
                s.name, s.command, env={**os.environ, **environment}, log_path=log_folder / f"{s.name}.log"
            )
            for s in services
        }
        self._restarts = dict.fromkeys((s.name for s in services), 0)
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._watch_health, name="orchestrator", daemon=True)
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for spec in self._specs:
                self._report(f"starting {spec.name}")
                undo.callback(self._children[spec.name].stop)
                self._start(spec)
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
            ServiceHealth(name, child.is_alive, self._restarts[name], child.log_path)
            for name, child in self._children.items()
        )

    def _start(self, spec: ServiceSpec) -> None:
        """Start a service and wait until it is ready. Its log may have the text of an earlier process."""
        child, ready = self._children[spec.name], spec.ready_text.encode()
        old_bytes = child.log_path.stat().st_size if child.log_path.exists() else 0
        child.start()
        child.wait_until_ready(lambda: ready in child.log_path.read_bytes()[old_bytes:], START_TIMEOUT_S)

    def _watch_health(self) -> None:
        while not self._stopping.wait(HEALTH_INTERVAL_S):
            for name, child in self._children.items():
                if not child.is_alive and self._restarts[name] < MAX_RESTARTS:
                    self._restarts[name] += 1
                    _log.warning("service.restarted", service=name, restarts=self._restarts[name])
                    child.start()
