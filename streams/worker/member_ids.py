"""Slots: which of this host's workers this is, so that a restarted one is known again.

Two workers with one membership id would fence each other; a file lock keeps a slot to one.
"""

import socket
from pathlib import Path

import filelock

from esper.errors import ConfigError, ConflictError

MAX_MEMBER_IDS = 64


class MemberId:
    """A slot that is held until the process ends or ``release``."""

    def __init__(self, number: int, lock: filelock.BaseFileLock) -> None:
        self.number = number
        self._lock = lock

    @property
    def instance_id(self) -> str:
        """The static membership id: host and slot."""
        return f"{socket.gethostname()}-{self.number}"

    def release(self) -> None:
        """Let another worker have it."""
        self._lock.release()


def acquire_member_id(folder: Path, wanted: int | None = None) -> MemberId:
    """The first free slot, or the one that is wanted.

    Raises:
        ConflictError: another worker of this host holds it.
        ConfigError: the folder cannot be made or written to.
    """
    try:
        return _take(folder, wanted)
    except OSError as error:
        raise ConfigError(
            f"no slot can be kept in {folder}: {error.strerror or error}; name a folder that this user may write to "
            "(ESPER_STATE_DIR)"
        ) from error


def _take(folder: Path, wanted: int | None) -> MemberId:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MAX_MEMBER_IDS) if wanted is None else (wanted,):
        lock = filelock.FileLock(folder / f"worker-{number}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        return MemberId(number, lock)
    which = "every slot" if wanted is None else f"slot {wanted}"
    raise ConflictError(f"{which} of this host is held by another worker (locks in {folder})")
