"""PartitionExecutor keeps the jobs of a partition in order while other partitions run."""

import asyncio
from collections import defaultdict
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from esper.oona.records import TopicPartition
from esper.streams.worker.partition_executor import PartitionExecutor

WIDTH = 3


@given(
    jobs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=40),
    depth=st.integers(1, 6),
)
def test_executor_runs_one_job_per_partition_in_order(jobs: list[tuple[int, int]], depth: int) -> None:
    asyncio.run(run_jobs(jobs, depth))


async def run_jobs(jobs: list[tuple[int, int]], depth: int) -> None:
    executor, order, running = PartitionExecutor(WIDTH, depth), defaultdict[int, list[int]](list), set[TopicPartition]()

    async def job(tp: TopicPartition, number: int, pauses: int) -> None:
        assert tp not in running
        assert len(running) < WIDTH
        running.add(tp)
        for _ in range(pauses):
            await asyncio.sleep(0)
        running.remove(tp)
        order[tp[1]].append(number)

    for number, (partition, pauses) in enumerate(jobs):
        await executor.put(("topic", partition), partial(job, ("topic", partition), number, pauses))
    async with asyncio.timeout(5):
        while sum(map(len, order.values())) < len(jobs):
            await asyncio.sleep(0)
    assert all(numbers == sorted(numbers) for numbers in order.values())


async def test_executor_close_cancels_running_and_waiting_jobs() -> None:
    executor, begun, ended = PartitionExecutor(1, 5), asyncio.Event(), list[int]()

    async def job(number: int) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    await executor.put(("topic", 0), partial(job, 0))
    await executor.put(("topic", 0), partial(job, 1))
    await begun.wait()
    await executor.close()
    assert ended == [0]
