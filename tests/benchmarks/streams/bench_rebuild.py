"""Records per second of a rebuild against a sequential projection, and how long its swap blocks workers.

The sequential projection uses one connection, one topic after the other, batches of 2,000 and no read-ahead. Broker,
Postgres and both readers share one machine: compare the ratios, each of one pair of runs.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench_streams import fill, reports
from support.processes.esper_processes import running, worker
from support.stacks import running_stack

from esper.config import Settings
from esper.embedded.stack import EmbeddedStack
from esper.oona.admin.topics import cluster_id
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.schemas.topics import TELEMETRY
from esper.streams.database.connections import connect
from esper.streams.database.migrations import migrate
from esper.streams.database.stored_positions import claim_cluster
from esper.streams.replay import ComparisonOptions, rebuild, verify
from esper.streams.worker.batch_projection import Batch, project_batch

PLAIN_BATCH = 2_000
PAUSE_S = 0.02
SENT_AT_ONCE = 40


async def project_sequentially(settings: Settings, schema: str) -> float:
    """Project the telemetry into a schema. Returns the duration in seconds."""
    kafka, postgres = settings.need_kafka(), settings.need_postgres()
    await asyncio.to_thread(migrate, postgres, schema)
    connection = await connect(postgres, schema)
    await claim_cluster(connection, await cluster_id(kafka), kafka)
    starts = dict.fromkeys(range(TELEMETRY.num_partitions), 0)
    waiting: dict[int, list[Any]] = {}

    async def take(partition: int) -> None:
        batch = Batch(TELEMETRY.name, partition, starts[partition], tuple(waiting.pop(partition)))
        starts[partition] = batch.end
        await project_batch(connection, batch)

    begun = time.perf_counter()
    async for record in read_range(kafka, TELEMETRY):
        partition = record.position.partition
        waiting.setdefault(partition, []).append(record)
        if len(waiting[partition]) >= PLAIN_BATCH:
            await take(partition)
    for partition in list(waiting):
        await take(partition)
    seconds = time.perf_counter() - begun
    await connection.close()
    return seconds


async def measure(stack: EmbeddedStack, num_records: int, rounds: int) -> None:
    """Measure a sequential projection and a rebuild of the same log in turns, then a verify."""
    settings = stack.settings()
    live = settings.need_postgres().schema_name
    await fill(stack, "plain", num_records, 1)
    for n in range(rounds):
        sequential_s = await project_sequentially(settings, live if n == 0 else f"plain{n}")
        marks: dict[str, float] = {}
        begun = time.perf_counter()
        done = await rebuild(settings, lambda progress, m=marks: m.setdefault(progress.phase, time.perf_counter()))
        total_s, projection_s = time.perf_counter() - begun, marks["gathering statistics"] - marks["projecting"]
        print(
            f"sequential {num_records / sequential_s:>7,.0f} records/s; rebuild: projection {num_records / projection_s:>7,.0f}"
            f" ({sequential_s / projection_s:.2f}x), in total {num_records / total_s:>7,.0f} ({sequential_s / total_s:.2f}x);"
            f" locked {done.locked_s:.3f} s",
            flush=True,
        )
    begun = time.perf_counter()
    assert all(c.is_equal for c in await verify(settings))
    print(f"verify, in total {num_records / (time.perf_counter() - begun):>7,.0f} records/s", flush=True)


async def measure_under_load(stack: EmbeddedStack, rounds: int) -> None:
    """Measure how long rebuilds hold the lock while a trainer sends and a worker projects."""
    settings, ended = stack.settings(), asyncio.Event()

    async def keep_sending() -> None:
        records = reports("busy", sys.maxsize, 1)
        async with OonaProducer(settings.need_kafka()) as producer:
            while not ended.is_set():
                await producer.deliver([next(records) for _n in range(SENT_AT_ONCE)])
                await asyncio.sleep(PAUSE_S)

    sender = asyncio.create_task(keep_sending())
    for n in range(rounds):
        done = await rebuild(settings, comparison=ComparisonOptions() if n == rounds - 1 else None)
        compared = "" if not done.comparisons else f"; compared: {all(c.is_equal for c in done.comparisons)}"
        print(f"rebuild under load     {done.num_records:>9,} records; workers waited {done.locked_s:.3f} s{compared}")
    ended.set()
    await sender


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000, help="layer records of 4 signals")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with running_stack() as stack, tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(stack, arguments.records, arguments.rounds))
        with running(worker(stack, Path(folder)), "worker.ready"):
            asyncio.run(measure_under_load(stack, arguments.rounds))


if __name__ == "__main__":
    main()
