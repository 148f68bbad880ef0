"""Cost of a decision before the policy runs: reading the rows of a view, assembling the view, and polling.

The table has views of 10, 100 and 1,000 layers with 4 seeds each, then polls with more and more ended runs and a fixed
number of running ones. CPU is the p50 of this process, without Postgres. SQL creates the rows (``view_tables``) in the
embedded Postgres.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import asyncpg

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.data.view_tables import Runs, analyzed, fill_library, fill_runs
from support.stacks import running_stack

from esper.config import PostgresSettings
from esper.graph.assembly import assemble
from esper.graph.graph_view import GraphView
from esper.graph.view_rows import ViewRows
from esper.streams.database.health_window_partitions import make_partitions
from esper.streams.read_models.pending_boundaries import (
    decisions_without_command,
    is_complete,
    pending_boundaries,
)
from esper.streams.read_models.view_row_reader import read_view_rows

BOUNDARY = 60
NUM_SEEDS = 4
NUM_BLUEPRINTS = 100
NUM_RUNNING = 20
NUM_WARM_UP = 3


def percentile(times_s: Sequence[float], share: float) -> float:
    """Percentile in milliseconds, by the nearest rank."""
    return 1000 * sorted(times_s)[min(len(times_s) - 1, int(share * len(times_s)))]


def print_row(what: str, size: str, times: tuple[Sequence[float], Sequence[float]], remark: str = "") -> None:
    times_s, cpu_s = times
    figures = (percentile(times_s, 0.5), percentile(times_s, 0.95), percentile(cpu_s, 0.5))
    print(f"{what:26s}{size:>14s}" + "".join(f"{ms:10.2f}" for ms in figures) + f"  {remark}", flush=True)


async def timed(act: Callable[[], Awaitable[Any]], rounds: int) -> tuple[list[float], list[float]]:
    """Wall-clock and CPU seconds of each round after the warm-up."""
    times_s, cpu_s = [], []
    for _n in range(NUM_WARM_UP + rounds):
        began, cpu = time.perf_counter(), time.process_time()
        await act()
        times_s.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - cpu)
    return times_s[NUM_WARM_UP:], cpu_s[NUM_WARM_UP:]


@asynccontextmanager
async def open_connection(postgres: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    path = {"search_path": postgres.schema_name}
    connection = await asyncpg.connect(postgres.dsn.get_secret_value(), server_settings=path)
    try:
        yield connection
    finally:
        await connection.close()


async def time_views(connection: asyncpg.Connection, num_layers: int, rounds: int) -> None:
    """Measure reading, assembling, encoding and decoding one view."""
    run_id = f"wide{num_layers}-1"
    await fill_runs(connection, Runs(run_id.removesuffix("-1"), 1, "running", BOUNDARY, num_layers, 0, NUM_SEEDS))
    await analyzed(connection)

    async def read() -> ViewRows:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return await read_view_rows(connection, run_id, 1, BOUNDARY)

    rows = await read()
    data = assemble(rows).to_bytes()

    async def to_bytes() -> None:
        assemble(rows).to_bytes()

    async def from_bytes() -> None:
        GraphView.from_bytes(data)

    async def both() -> None:
        assemble(await read()).to_bytes()

    size = f"{num_layers:,} layers"
    print_row("completeness check", size, await timed(lambda: is_complete(connection, run_id, 1, BOUNDARY), rounds))
    print_row("read the rows", size, await timed(read, rounds), f"{len(rows.windows):,} windows")
    print_row("assemble and encode", size, await timed(to_bytes, rounds), f"{len(data) / 1e6:.2f} MB")
    print_row("read, assemble, encode", size, await timed(both, rounds))
    print_row("decode", size, await timed(from_bytes, rounds))


async def time_polls(connection: asyncpg.Connection, num_ended: int, rounds: int) -> None:
    """Measure a poll that finds ``NUM_RUNNING`` boundaries with nothing to decide."""
    await fill_runs(connection, Runs(f"ended{num_ended}", num_ended, num_boundaries=10))
    await analyzed(connection)
    (total,) = await connection.fetchrow("SELECT count(*) FROM runs")
    size = f"{total:,} runs"
    pending = await pending_boundaries(connection)
    print_row(
        "pending boundaries",
        size,
        await timed(lambda: pending_boundaries(connection), rounds),
        f"{len(pending)} pending",
    )
    print_row("decisions without command", size, await timed(lambda: decisions_without_command(connection), rounds))


async def measure(postgres: PostgresSettings, rounds: int, runs_ended: Sequence[int]) -> None:
    async with open_connection(postgres) as connection:
        async with connection.transaction():
            await make_partitions(connection, [date(2026, 1, 1)])
        await fill_library(connection, NUM_BLUEPRINTS)
        print(" " * 40 + "".join(f"{head:>10s}" for head in ("p50 ms", "p95 ms", "CPU ms")))
        for num_layers in (10, 100, 1000):
            await time_views(connection, num_layers, rounds)
        await connection.execute("UPDATE runs SET status = 'completed'")
        await fill_runs(connection, Runs("live", NUM_RUNNING, "running"))
        for num_ended in runs_ended:
            await time_polls(connection, num_ended, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each measurement")
    parser.add_argument(
        "--ended",
        type=int,
        nargs="+",
        default=[1_000, 9_000],
        help="numbers of ended runs to add before each measurement",
    )
    given = parser.parse_args()
    with running_stack() as stack:
        asyncio.run(measure(stack.settings().need_postgres(), given.rounds, given.ended))


if __name__ == "__main__":
    main()
