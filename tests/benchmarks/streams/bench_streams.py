"""Health signals per second from topic to committed rows, on 1, 2 and 4 workers and with more and more stored rows.

Fills the log first, then starts the workers and measures from the first committed record to the last. Broker, Postgres
and workers share one machine. ``--profile`` profiles one worker.
"""

import argparse
import asyncio
import os
import pstats
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import asyncpg
from aiokafka import AIOKafkaProducer
from confluent_kafka import Producer

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.conditions import wait_until
from support.processes.esper_processes import SCRIPTS, log_of, process, worker
from support.stacks import running_stack

from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack
from esper.oona.cloudevents import encode
from esper.oona.records import Record, partition_for
from esper.schemas import events, ids
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.topics import TELEMETRY

SEEDS = 4
RUNS, LAYERS = 24, 20
POLL_S = 0.05
DEADLINE_S = 120
FOLDED = "SELECT coalesce(sum(next_offset), 0)::bigint FROM esper.positions WHERE topic = $1"
SENT_AT_ONCE, MAX_BATCH_BYTES = 400, 2_000_000


def reports(name: str, num_records: int, every: int) -> Iterator[Record]:
    """Interleaved reports of many runs, layer by layer; one step in ``every`` is sampled."""
    for n in range(num_records):
        step, place = divmod(n, RUNS * LAYERS)
        run, layer = place % RUNS, place // RUNS
        run_id, layer_id, at = f"{name}-{run}", f"block{layer}.conv", step * every
        signals = tuple(
            HealthSignal(
                layer_id=layer_id,
                seed_id=seed,
                chunk_id=seed,
                epoch=0,
                health_score=0.9 - 0.001 * (n % 500),
                activation_mean=0.1234567 * seed + 1e-6 * n,
                activation_std=1.234567 + 1e-6 * n,
                dead_ratio=0.01 * (n % 90),
                gradient_norm=0.01234567 + 1e-7 * n,
            )
            for seed in range(SEEDS)
        )
        sequence = step * LAYERS + layer
        event = events.LayerHealthMeasured(
            run_id=run_id, incarnation=1, sequence=sequence, step=at, epoch=0, layer_id=layer_id, signals=signals
        )
        yield encode(OonaMessage.of(event, id=ids.trainer_event_id(run_id, 1, sequence), source="bench"))


async def fill(stack: EmbeddedStack, name: str, num_records: int, every: int) -> None:
    """Write the reports to the topic in batches, as a trainer sends telemetry."""
    brokers = stack.settings().need_kafka().bootstrap_servers
    producer = AIOKafkaProducer(bootstrap_servers=brokers, compression_type="zstd", max_batch_size=MAX_BATCH_BYTES)
    await producer.start()
    waiting: dict[int, list[Record]] = {}

    async def send(partition: int) -> None:
        batch = producer.create_batch()
        for record in waiting.pop(partition):
            added = batch.append(key=record.key, value=record.value, timestamp=None, headers=list(record.headers))
            assert added is not None, "batch full"
        await producer.send_batch(batch, TELEMETRY.name, partition=partition)

    for record in reports(name, num_records, every):
        partition = partition_for(record.key or b"", TELEMETRY.num_partitions)
        waiting.setdefault(partition, []).append(record)
        if len(waiting[partition]) >= SENT_AT_ONCE:
            await send(partition)
    for partition in list(waiting):
        await send(partition)
    await producer.flush()
    await producer.stop()


async def timed(stack: EmbeddedStack, total: int) -> tuple[float, float]:
    """Wait until ``total`` records are projected. Returns the seconds from 5 % to 95 % of the rest, and that share."""
    connection = await asyncpg.connect(stack.postgres.dsn)
    begin, marks = int(await connection.fetchval(FOLDED, TELEMETRY.name)), list[tuple[float, int]]()
    deadline = time.monotonic() + DEADLINE_S
    while not marks or marks[-1][1] < total:
        marks.append((time.monotonic(), int(await connection.fetchval(FOLDED, TELEMETRY.name))))
        assert marks[-1][0] < deadline, f"only {marks[-1][1]:,} of {total:,} records in {DEADLINE_S} s"
        await asyncio.sleep(POLL_S)
    await connection.close()
    inner = [m for m in marks if begin + 0.05 * (total - begin) <= m[1] <= begin + 0.95 * (total - begin)]
    first, last = (inner[0], inner[-1]) if len(inner) > 1 else (marks[0], marks[-1])
    return last[0] - first[0], (last[1] - first[1])


async def stored_rows(stack: EmbeddedStack) -> int:
    connection = await asyncpg.connect(stack.postgres.dsn)
    count = int(await connection.fetchval("SELECT count(*) FROM esper.health_windows"))
    await connection.close()
    return count


def run_workers(stack: EmbeddedStack, folder: Path, name: str, count: int, total: int) -> None:
    """Project up to ``total`` records with ``count`` workers, and print the rate."""
    with ExitStack() as exits:
        workers = [worker(stack, folder, f"{name}-{n}") for n in range(count)]
        for child in workers:
            child.start()
            exits.callback(child.stop)
        seconds, num_records = asyncio.run(timed(stack, total))
        rows, busy = asyncio.run(stored_rows(stack)), sum(cpu_seconds(child) for child in workers)
    rate = num_records / seconds
    print(
        f"{name:<22} {count} worker(s): {rate:>9,.0f} records/s = {rate * SEEDS:>9,.0f} signals/s; "
        f"{rows:>9,} windows stored; {busy:.1f} s CPU of workers",
        flush=True,
    )


def hold(stack: EmbeddedStack, folder: Path, rate: int, seconds: int, total: int) -> None:
    """Measure the lag of a worker behind a writer of ``rate`` records per second."""
    records = list(reports("held", rate * seconds, 1))
    child = worker(stack, folder, "held")
    child.start()
    try:
        asyncio.run(timed(stack, total))  # the earlier records are projected
        lags = asyncio.run(behind(stack, records, rate, total))
    finally:
        child.stop()
    lags.sort()
    print(
        f"steady load: {rate:,} records/s = {rate * SEEDS:,} signals/s for {seconds} s, one worker: latency from send to commit "
        f"p50 {lags[len(lags) // 2]:.2f} s, p95 {lags[len(lags) * 95 // 100]:.2f} s, max {lags[-1]:.2f} s",
        flush=True,
    )


async def behind(stack: EmbeddedStack, records: list[Record], rate: int, total: int) -> list[float]:
    """Send at a rate. Returns samples of the age in seconds of the newest committed record."""
    brokers = stack.settings().need_kafka().bootstrap_servers
    producer = Producer({"bootstrap.servers": brokers, "linger.ms": 20, "compression.type": "zstd", "acks": "all"})
    connection = await asyncpg.connect(stack.postgres.dsn)
    begin, sent, ages = time.monotonic(), 0, list[float]()
    folded = 0
    while folded < len(records):
        due = min(len(records), int((time.monotonic() - begin) * rate))
        for record in records[sent:due]:
            partition = partition_for(record.key or b"", TELEMETRY.num_partitions)
            producer.produce(
                TELEMETRY.name, record.value, record.key, partition=partition, headers=list(record.headers)
            )
        sent = due
        producer.poll(0)
        folded = int(await connection.fetchval(FOLDED, TELEMETRY.name)) - total
        ages.append(time.monotonic() - begin - folded / rate)
        assert ages[-1] < DEADLINE_S, f"only {folded:,} of {sent:,} records"
        await asyncio.sleep(POLL_S)
    await connection.close()
    return ages


def cpu_seconds(child: ChildProcess) -> float:
    import psutil

    times = psutil.Process(child.pid).cpu_times()
    return float(times.user + times.system)


PROFILED = """
import cProfile, signal, sys
profile, out = cProfile.Profile(), sys.argv[1]
signal.signal(signal.SIGRTMIN, lambda *_: profile.dump_stats(out))
profile.enable()
sys.argv = ["faust", "-A", "esper.streams", "worker", "--without-web"]
from faust.cli.faust import cli
cli()
"""


def profile(stack: EmbeddedStack, folder: Path, total: int) -> None:
    """Profile one worker with cProfile, which slows it down: compare the shares."""
    out = folder / "profile"
    child = process(stack, folder, "profiled", str(SCRIPTS / "python"), "-c", PROFILED, str(out))
    child.start()
    asyncio.run(timed(stack, total))
    os.kill(child.pid, signal.SIGRTMIN)
    wait_until(lambda: out.exists() and out.stat().st_size > 0, 30, f"the profile; {log_of(child)[-500:]}")
    child.stop()
    pstats.Stats(str(out)).sort_stats("tottime").print_stats(22)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000, help="layer records of 4 signals, per measurement")
    parser.add_argument("--every", type=int, default=1, help="sample one step in this many")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of one worker, each with more stored rows")
    parser.add_argument("--hold", type=int, default=20, help="duration of the steady load in seconds; 0 skips it")
    parser.add_argument("--rate", type=int, default=10_000, help="records per second of the steady load")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    total = 0
    with running_stack() as stack, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for n in range(arguments.rounds):
            asyncio.run(fill(stack, f"round{n}", arguments.records, arguments.every))
            total += arguments.records
            run_workers(stack, folder, f"round {n + 1}", 1, total)
        for count in arguments.workers:
            asyncio.run(fill(stack, f"by{count}", arguments.records, arguments.every))
            total += arguments.records
            run_workers(stack, folder, f"shared by {count}", count, total)
        if arguments.hold:
            hold(stack, folder, arguments.rate, arguments.hold, total)
            total += arguments.rate * arguments.hold
        if arguments.profile:
            asyncio.run(fill(stack, "profiled", arguments.records, arguments.every))
            profile(stack, folder, total + arguments.records)


if __name__ == "__main__":
    main()
