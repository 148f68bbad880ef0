"""Decisions per second, and the latency from a boundary's rows to the acknowledged decision, for 1 to 128 runs.

Compares batches with single decisions (``max_batch`` of 1) in turns, with the same service, policy, rows and broker. SQL
creates the rows (``view_tables``) for ended runs; one statement then sets their status to `running`, and the clock
starts. A poll begins at once, so the figures do not include ``tamiyo.poll_s``. The view of a decision is recorded before
it; commands follow it and are not included.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.data.view_tables import Runs, analyzed, fill_library, fill_runs
from support.stacks import running_stack

from esper.config import Settings
from esper.services.tamiyo.decision_service import DecisionService
from esper.services.tamiyo.settings import TamiyoSettings
from esper.streams.database.connections import connect_pool
from esper.streams.database.health_window_partitions import make_partitions
from esper.streams.read_models.pending_boundaries import PendingBoundary

MODES = ("batched", "one by one")
BOUNDARIES = 20
NUM_BLUEPRINTS = 100


@dataclass
class Times:
    """Durations of one variant and size in seconds: from rows to decision, and of whole polls."""

    decisions_s: list[float] = field(default_factory=list)
    polls_s: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return len(self.decisions_s) / sum(self.polls_s)


def percentile(times_s: Sequence[float], share: float) -> float:
    """Percentile in milliseconds, by the nearest rank."""
    return 1000 * sorted(times_s)[min(len(times_s) - 1, int(share * len(times_s)))]


async def poll(service: DecisionService, connection: Any, runs: Runs, times: Times) -> None:
    """Create runs, make them visible, and record when each is decided."""
    queue: Any = service._queue
    await fill_runs(connection, runs)
    mark_decided = queue.mark_decided
    moments: list[float] = []

    def record_time(boundary: PendingBoundary) -> float:
        moments.append(time.perf_counter())
        return float(mark_decided(boundary))

    queue.mark_decided = record_time
    await connection.execute("UPDATE runs SET status = 'running' WHERE starts_with(run_id, $1)", f"{runs.prefix}-")
    began = time.perf_counter()
    await service.tick()
    times.polls_s.append(time.perf_counter() - began)
    queue.mark_decided = mark_decided
    assert len(moments) == runs.count, f"{len(moments)} of {runs.count} runs were decided"
    times.decisions_s += [at - began for at in moments]
    await connection.execute("UPDATE runs SET status = 'completed' WHERE status = 'running'")


async def measure(settings: Settings, given: argparse.Namespace) -> None:
    sizes, rounds = given.runs, given.rounds
    tamiyo = TamiyoSettings.model_validate({"policy": given.policy, "stale_after_s": 600.0, "max_batch": given.batch})
    settings_of = {"batched": tamiyo, "one by one": tamiyo.model_copy(update={"max_batch": 1})}
    async with (
        connect_pool(settings.need_postgres()) as pool,
        pool.acquire() as connection,
        DecisionService(settings, tamiyo) as service,
    ):
        async with connection.transaction():
            await make_partitions(connection, [date(2026, 1, 1)])
        await fill_library(connection, NUM_BLUEPRINTS)
        found = {(name, size): Times() for size in sizes for name in MODES}
        for number in range(rounds + 1):
            turns = list(found.items())
            for (name, size), times in (
                turns if number % 2 else reversed(turns)
            ):  # the order of the variants matters too
                service._tamiyo = settings_of[name]
                runs = Runs(f"{name[0]}{size}x{number}", size, "completed", BOUNDARIES, given.layers)
                await poll(service, connection, runs, times if number else Times())  # the first round is the warm-up
                if number == 0:
                    await analyzed(connection)
        show(found, sizes)


def show(found: dict[tuple[str, int], Times], sizes: Sequence[int]) -> None:
    heads = ("decisions/s", "p50 ms", "p95 ms", "poll p50 ms", "decisions")
    print(f"{'runs':>12s} {'':12s}" + "".join(f"{head:>13s}" for head in heads))
    for size in sizes:
        for name in MODES:
            times = found[name, size]
            figures = (times.per_second, *(percentile(times.decisions_s, s) for s in (0.5, 0.95)),
                       percentile(times.polls_s, 0.5))  # fmt: skip
            row = "".join(f"{figure:13,.1f}" for figure in figures)
            print(f"{size:12d} {name:12s}{row}{len(times.decisions_s):13,d}")
        ratio = found["batched", size].per_second / found["one by one", size].per_second
        print(f"{'':12s} {'':12s}{ratio:12.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, nargs="+", default=[1, 8, 32, 128], help="numbers of runs that are at a boundary"
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="rounds after the warm-up; every other round is in reverse order"
    )
    parser.add_argument("--layers", type=int, default=10, help="layers of each run, with 2 seeds each")
    parser.add_argument("--policy", default="heuristic", help="policy that decides")
    parser.add_argument("--batch", type=int, default=TamiyoSettings.model_fields["max_batch"].default, help="at most")
    given = parser.parse_args()
    print(f"{given.layers} layers, 2 seeds each, {given.policy}; batches of {given.batch}; {given.rounds} rounds")
    with running_stack() as stack:
        asyncio.run(measure(stack.settings(), given))


if __name__ == "__main__":
    main()
