"""Commits offsets to the consumer group: for all partitions at once, a few times a second.

A commit is a write on the broker; one for each small batch would be most of the broker's work. Records that were
handled but not committed are handled again after a crash, unless the handler stores its own positions.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

import aiokafka
from aiokafka.errors import IllegalStateError, KafkaError

from esper.logging import get_logger
from esper.oona.records import TopicPartition

COMMIT_INTERVAL_S = 0.2  # the most work that is repeated after a crash

_log = get_logger(__name__)


class OffsetCommits:
    """The offsets of one group member that are not committed yet.

    Args:
        commit: commits offsets: partition -> the next offset to read.
    """

    def __init__(self, commit: Callable[[dict[aiokafka.TopicPartition, int]], Awaitable[None]], group: str) -> None:
        self._commit, self._group = commit, group
        self._pending: dict[TopicPartition, int] = {}
        self._failing_since: float | None = None

    @property
    def failing_s(self) -> float:
        """For how long commits have failed, in seconds; 0 while they succeed."""
        return time.monotonic() - self._failing_since if self._failing_since is not None else 0.0

    def add(self, tp: TopicPartition, offset: int) -> None:
        """Note that every record below ``offset`` is handled; the next ``commit`` commits it."""
        self._pending[tp] = offset

    async def keep_committing(self) -> None:
        """Commit every ``COMMIT_INTERVAL_S``, until cancelled."""
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_S)
            await self.commit()

    async def commit(self) -> None:
        """Commit the pending offsets. They stay pending where the commit fails."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            await self._commit({aiokafka.TopicPartition(*tp): offset for tp, offset in pending.items()})
            self._failing_since = None
        except (KafkaError, IllegalStateError) as error:
            self._pending = {**pending, **self._pending}
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                _log.warning("commit.delayed", group=self._group, partitions=len(pending), error=repr(error))

    async def revoke(self, partitions: Iterable[TopicPartition]) -> None:
        """Commit once more, and drop the offsets of partitions that another member reads from now on."""
        await self.commit()
        for tp in partitions:
            self._pending.pop(tp, None)
