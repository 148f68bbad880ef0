"""Static group member ids: one number per worker on a host, which a restarted worker takes again.

Invariant: two workers of a host never share a number (they would fence each other); a file lock guards each one.
"""

import socket
from pathlib import Path

import filelock

from esper.errors import ConfigError, ConflictError

MAX_MEMBER_IDS = 64


class MemberId:
    """A number that this process holds until it ends or calls ``release``."""

    def __init__(self, number: int, lock: filelock.BaseFileLock) -> None:
        self.number = number
        self._lock = lock

    @property
    def instance_id(self) -> str:
        """Kafka's group instance id: host name and number."""
        return f"{socket.gethostname()}-{self.number}"

    def release(self) -> None:
        """Free the number for another worker."""
        self._lock.release()


def acquire_member_id(folder: Path, number: int | None = None) -> MemberId:
    """Lock the given number, or the first free one if None.

    Raises:
        ConflictError: another worker of this host holds it.
        ConfigError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for candidate in range(MAX_MEMBER_IDS) if number is None else (number,):
            lock = filelock.FileLock(folder / f"worker-{candidate}.lock")
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                continue
            return MemberId(candidate, lock)
    except OSError as error:
        raise ConfigError(
            f"no member id can be locked in {folder}: {error.strerror or error}; point ESPER_STATE_DIR to a folder "
            "that this user may write to"
        ) from error
    which = "every member id" if number is None else f"member id {number}"
    raise ConflictError(
        f"{which} of this host is held by another worker (locks in {folder}); stop one, or set streams.member_id"
    )
