"""What the embedded Kafka, Postgres and S3 have in common: a folder, a port, a process and its end."""

import shutil
from pathlib import Path

from esper.embedded.processes import ChildProcess, free_port


class EmbeddedServer:
    """Holds its port and its data through ``stop`` and ``start``.

    Args:
        root: a folder of its own.
        log_name: the file in it that gets what the process prints.
        port: where it listens; chosen at the first start where it is None.
    """

    def __init__(self, root: Path, log_name: str, port: int | None = None) -> None:
        self.root = root
        self.log_path = root / log_name
        self._port = port
        self._process: ChildProcess | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._port is None:
            self._port = free_port()
        return self._port

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.is_alive

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._process.pid if self._process is not None else None

    def stop(self) -> None:
        """A clean shutdown."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.kill()

    def wipe(self) -> None:
        """Forget all data. It must be stopped."""
        shutil.rmtree(self.root / "data", ignore_errors=True)
