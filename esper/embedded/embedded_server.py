"""Base class of the embedded Kafka, Postgres and S3: folder, port and child process."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.embedded.processes import ChildProcess, free_port, is_listening

START_TIMEOUT_S = 60.0


class EmbeddedServer(ABC):
    """An embedded server. It keeps its port and its data from ``stop`` to the next ``start``.

    Args:
        root: folder for this server only.
        name: name of the server in messages and, in lower case, of its log file.
        port: port to listen on; None chooses a free one on first use.
    """

    def __init__(self, root: Path, name: str, port: int | None = None) -> None:
        self.root = root
        self.log_path = root / f"{name.lower()}.log"
        self._name = name
        self._port = port
        self._process: ChildProcess | None = None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        if self._port is None:
            self._port = free_port()
        return self._port

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive

    @property
    def pid(self) -> int | None:
        """The process id while it runs, else None."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start it and wait until it accepts connections.

        Raises:
            UnavailableError: it does not start; the message has the end of its log.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._process = self._prepare()
        self._process.start()
        self._process.wait_until_ready(self._is_ready, START_TIMEOUT_S)

    def stop(self) -> None:
        """Shut it down cleanly."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """Kill it with SIGKILL, which leaves its data as a power cut would."""
        if self._process is not None:
            self._process.kill()

    def wipe(self) -> None:
        """Delete all data. Call ``stop`` first."""
        shutil.rmtree(self.root / "data", ignore_errors=True)

    @abstractmethod
    def _prepare(self) -> ChildProcess:
        """Ready ``root``, and return the process to start."""

    def _is_ready(self) -> bool:
        return is_listening(self.port)

    def _child(self, command: Sequence[str], env: Mapping[str, str], **options: Any) -> ChildProcess:
        env = {"PATH": os.environ.get("PATH", ""), **env}
        return ChildProcess(self._name, command, env=env, log_path=self.log_path, cwd=self.root, **options)
