"""Commits: tells the group what is done with, all partitions at once, a few times a second.

A commit is a write on the broker; one for each small batch would be most of its work. What was handled
and not committed yet comes again after a kill, unless the handler keeps positions of its own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

import aiokafka
from aiokafka.errors import IllegalStateError, KafkaError

from esper.logging import get_logger
from esper.oona.records import TopicPartition

COMMIT_EVERY_S = 0.2  # so much work at most is handled again after a kill

_log = get_logger(__name__)


class Commits:
    """The positions of one group member that the group does not know yet.

    Args:
        commit: tells the group: partition -> the next offset.
    """

    def __init__(self, commit: Callable[[dict[aiokafka.TopicPartition, int]], Awaitable[None]], group: str) -> None:
        self._commit, self._group = commit, group
        self._waiting: dict[TopicPartition, int] = {}
        self._failing_since: float | None = None

    @property
    def failing_s(self) -> float:
        """For how long the group has taken no position; 0 where it takes them."""
        return time.monotonic() - self._failing_since if self._failing_since is not None else 0.0

    def done(self, place: TopicPartition, offset: int) -> None:
        """Everything below ``offset`` is handled."""
        self._waiting[place] = offset

    async def keep_committing(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(COMMIT_EVERY_S)
            await self.commit()

    async def commit(self) -> None:
        """Commit what waits; what fails waits on."""
        waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        try:
            await self._commit({aiokafka.TopicPartition(*place): offset for place, offset in waiting.items()})
            self._failing_since = None
        except (KafkaError, IllegalStateError) as error:
            self._waiting = {**waiting, **self._waiting}
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                _log.warning("commit.delayed", group=self._group, partitions=len(waiting), error=repr(error))

    async def leave(self, places: Iterable[TopicPartition]) -> None:
        """Partitions are given away: commit once more, and forget them."""
        await self.commit()
        for place in places:
            self._waiting.pop(place, None)
