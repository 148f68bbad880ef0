"""What a decision costs before the policy is asked: reading a view's rows, assembling them, and the look at every poll.

One table: views of 10, 100 and 1,000 layers with 4 seeds each; then the poll, with more and more runs that are
over, and the same number under way. CPU is this process's at p50, without Postgres'. Rows are made by SQL
(``view_tables``), Postgres is the embedded one.
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
    read_view_rows,
)

BOUNDARY = 60
NUM_SEEDS = 4
NUM_BLUEPRINTS = 100
UNDER_WAY = 20
WARM = 3


def percentile(times_s: Sequence[float], share: float) -> float:
    """In milliseconds, by the nearest rank."""
    return 1000 * sorted(times_s)[min(len(times_s) - 1, int(share * len(times_s)))]


def tell(what: str, size: str, times: tuple[Sequence[float], Sequence[float]], remark: str = "") -> None:
    times_s, cpu_s = times
    figures = (percentile(times_s, 0.5), percentile(times_s, 0.95), percentile(cpu_s, 0.5))
    print(f"{what:26s}{size:>14s}" + "".join(f"{ms:10.2f}" for ms in figures) + f"  {remark}", flush=True)


async def timed(act: Callable[[], Awaitable[Any]], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round, by the clock and of this process's CPU; the first ones left out."""
    times_s, cpu_s = [], []
    for _n in range(WARM + rounds):
        began, cpu = time.perf_counter(), time.process_time()
        await act()
        times_s.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - cpu)
    return times_s[WARM:], cpu_s[WARM:]


@asynccontextmanager
async def connected(postgres: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    path = {"search_path": postgres.schema_name}
    connection = await asyncpg.connect(postgres.dsn.get_secret_value(), server_settings=path)
    try:
        yield connection
    finally:
        await connection.close()


async def time_views(connection: asyncpg.Connection, num_layers: int, rounds: int) -> None:
    """One run's view: its rows, its bytes, and both back again."""
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
    tell("is it complete?", size, await timed(lambda: is_complete(connection, run_id, 1, BOUNDARY), rounds))
    tell("reading the rows", size, await timed(read, rounds), f"{len(rows.windows):,} windows")
    tell("assembling, to bytes", size, await timed(to_bytes, rounds), f"{len(data) / 1e6:.2f} MB")
    tell("both", size, await timed(both, rounds))
    tell("from bytes", size, await timed(from_bytes, rounds))


async def time_polls(connection: asyncpg.Connection, num_over: int, rounds: int) -> None:
    """A round of Tamiyo in which nothing is to be decided but ``UNDER_WAY`` boundaries are looked at."""
    await fill_runs(connection, Runs(f"over{num_over}", num_over, num_boundaries=10))
    await analyzed(connection)
    (total,) = await connection.fetchrow("SELECT count(*) FROM runs")
    size = f"{total:,} runs"
    pending = await pending_boundaries(connection)
    tell(
        "newest_boundaries",
        size,
        await timed(lambda: pending_boundaries(connection), rounds),
        f"{len(pending)} pending",
    )
    tell("decisions_without_command", size, await timed(lambda: decisions_without_command(connection), rounds))


async def measure(postgres: PostgresSettings, rounds: int, runs_over: Sequence[int]) -> None:
    async with connected(postgres) as connection:
        async with connection.transaction():
            await make_partitions(connection, [date(2026, 1, 1)])
        await fill_library(connection, NUM_BLUEPRINTS)
        print(" " * 40 + "".join(f"{head:>10s}" for head in ("p50 ms", "p95 ms", "CPU ms")))
        for num_layers in (10, 100, 1000):
            await time_views(connection, num_layers, rounds)
        await connection.execute("UPDATE runs SET status = 'completed'")
        await fill_runs(connection, Runs("live", UNDER_WAY, "running"))
        for num_over in runs_over:
            await time_polls(connection, num_over, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="of each measurement")
    parser.add_argument("--over", type=int, nargs="+", default=[1_000, 9_000], help="runs that are over, added in turn")
    given = parser.parse_args()
    with running_stack() as stack:
        asyncio.run(measure(stack.settings().need_postgres(), given.rounds, given.over))


if __name__ == "__main__":
    main()
