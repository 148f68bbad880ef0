"""Runs jobs of different partitions concurrently, and jobs of one partition in order.

A batch waits for Postgres most of the time; meanwhile batches of other partitions are decoded. A slow partition
delays only its own later jobs and, through ``depth``, what was read after them from the same topic.
"""

import asyncio
from collections.abc import Awaitable, Callable

from esper.oona.records import TopicPartition

Job = Callable[[], Awaitable[None]]


class PartitionExecutor:
    """Runs jobs, which must not raise.

    Args:
        width: the number of jobs that run at the same time, over all topics.
        depth: the number of jobs per topic that are accepted before ``put`` waits.
    """

    def __init__(self, width: int, depth: int) -> None:
        self._depth = depth
        self._running = asyncio.Semaphore(width)
        self._accepted: dict[str, asyncio.Semaphore] = {}
        self._tails: dict[TopicPartition, asyncio.Task[None]] = {}

    async def put(self, tp: TopicPartition, job: Job) -> None:
        """Schedule a job after every earlier one of this partition; wait while its topic has ``depth`` jobs."""
        topic, _partition = tp
        accepted = self._accepted.setdefault(topic, asyncio.Semaphore(self._depth))
        await accepted.acquire()
        tail = self._tails[tp] = asyncio.create_task(self._run(self._tails.get(tp), job, accepted))
        tail.add_done_callback(lambda done: self._forget(tp, done))

    async def close(self) -> None:
        """Cancel running and waiting jobs, and wait until they end."""
        tails = [*self._tails.values()]
        for tail in tails:
            tail.cancel()
        await asyncio.gather(*tails, return_exceptions=True)

    async def _run(self, previous: asyncio.Task[None] | None, job: Job, accepted: asyncio.Semaphore) -> None:
        try:
            if previous is not None:
                await previous
            async with self._running:
                await job()
        finally:
            accepted.release()

    def _forget(self, tp: TopicPartition, done: asyncio.Task[None]) -> None:
        if self._tails.get(tp) is done:
            del self._tails[tp]
