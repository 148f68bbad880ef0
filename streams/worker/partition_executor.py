"""Batches of different partitions side by side, those of one partition one after the other.

Folding waits for Postgres most of the time; meanwhile another partition's batch is decoded. Order is kept where
it counts, within a partition, and a partition that waits for long holds up only what was read after it.
"""

import asyncio
from collections.abc import Awaitable, Callable

from esper.oona.records import TopicPartition

Job = Callable[[], Awaitable[None]]


class PartitionExecutor:
    """Runs jobs that never raise, ``width`` at once.

    Args:
        width: jobs that run at once, over all topics.
        depth: jobs of a topic that are taken before ``put`` waits.
    """

    def __init__(self, width: int, depth: int) -> None:
        self._depth = depth
        self._free = asyncio.Semaphore(width)
        self._room: dict[str, asyncio.Semaphore] = {}
        self._tails: dict[TopicPartition, asyncio.Task[None]] = {}

    async def put(self, place: TopicPartition, job: Job) -> None:
        """Have a job run after all that were put at this place; wait where its topic has enough of them."""
        topic, _partition = place
        room = self._room.setdefault(topic, asyncio.Semaphore(self._depth))
        await room.acquire()
        tail = self._tails[place] = asyncio.create_task(self._run(self._tails.get(place), job, room))
        tail.add_done_callback(lambda done: self._forget(place, done))

    async def close(self) -> None:
        """Cancel what runs or waits, and see it end."""
        tails = [*self._tails.values()]
        for tail in tails:
            tail.cancel()
        await asyncio.gather(*tails, return_exceptions=True)

    async def _run(self, before: asyncio.Task[None] | None, job: Job, room: asyncio.Semaphore) -> None:
        try:
            if before is not None:
                await before
            async with self._free:
                await job()
        finally:
            room.release()

    def _forget(self, place: TopicPartition, done: asyncio.Task[None]) -> None:
        if self._tails.get(place) is done:
            del self._tails[place]
