"""Base class of the embedded Kafka, Postgres and S3: folder, port and child process."""

import shutil
from pathlib import Path

from esper.embedded.processes import ChildProcess, free_port


class EmbeddedServer:
    """An embedded server. It keeps its port and its data from ``stop`` to the next ``start``.

    Args:
        root: folder for this server only.
        log_name: file in ``root`` for the output of the process.
        port: port to listen on; None chooses a free one on first use.
    """

    def __init__(self, root: Path, log_name: str, port: int | None = None) -> None:
        self.root = root
        self.log_path = root / log_name
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
