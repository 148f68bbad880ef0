"""StorageStats: an observer of a ``BlobStore`` that adds up its operations."""

from collections import Counter
from dataclasses import dataclass, field

from esper.storage.s3_client import FinishedOperation, Outcome


@dataclass(slots=True)
class StorageStats:
    """Pass ``add`` to a ``BlobStore``. Keys are (operation, outcome), or the operation alone."""

    calls: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, finished: FinishedOperation) -> None:
        """Count one operation."""
        self.calls[finished.operation, finished.outcome] += 1
        self.retries[finished.operation] += finished.num_retries
        self.num_bytes[finished.operation] += finished.num_bytes
