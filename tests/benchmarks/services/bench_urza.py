"""Urza's API under wrk: latency, rate and errors of each route, and latency of each query.

Three loads: a few connections without pauses, 1,000 connections with one request per second each, and 1,000 without
pauses, more than the machine can serve. Measures two servers on the same rows: with the response cache and without it
(``urza.cache_mib`` 0), so that the benefit of the cache is a ratio of one run. wrk, server, worker, Postgres and broker
share one machine.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import httpx
import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.conditions import wait_until
from support.data.library_rows import LATER, OF_A_PAGE, fill
from support.processes.esper_processes import SCRIPTS, log_of, process, running, worker
from support.stacks import running_stack

from esper.embedded.stack import EmbeddedStack
from esper.errors import ConfigError
from esper.streams.database.sql_queries import queries

SCRIPT = Path(__file__).with_suffix(".lua")
READY_S = 180
WARM_S = 1
FEW = 8
PAUSE_MS = 1000
QUIET_PERCENT = 15.0  # of one core
NUM_PATHS = 300  # distinct paths of a route that reads another run each time


class Load(NamedTuple):
    """Concurrent connections, and the mean pause between two requests of each."""

    connections: int
    pause_ms: int

    def __str__(self) -> str:
        return f"{self.connections:,}" + (f", {self.pause_ms / 1000:g} s" if self.pause_ms else "")


Found = dict[tuple[str, Load], dict[str, Any]]
"""Measurements of wrk, by route and load."""


def find_wrk() -> str:
    """Path of wrk.

    Raises:
        ConfigError: wrk is not installed.
    """
    found = os.environ.get("ESPER_LOAD_GENERATOR") or shutil.which("wrk")
    if not found:
        raise ConfigError(
            "wrk is not on PATH; install it (Debian, Ubuntu: apt-get install wrk) or set ESPER_LOAD_GENERATOR to its path"
        )
    return found


def routes(url: str) -> dict[str, list[str]]:
    """Paths of each route, requested in turn."""
    kernel = httpx.get(f"{url}/kernels", params={"blueprint_id": "affine"}).json()["items"][0]["kernel_sha256"]
    runs = [f"run-{n:06d}" for n in range(NUM_PATHS)]
    return {
        "blueprints": ["/blueprints"],
        "blueprint": ["/blueprints/affine"],
        "outcomes": ["/blueprints/bp-0100/outcomes"],
        "living seeds": ["/blueprints/bp-0100/seeds"],
        "kernel": [f"/kernels/{kernel}"],
        "runs": ["/runs?limit=50"],
        "run (all different)": [f"/runs/{r}" for r in runs],
        "decisions (all different)": [f"/runs/{r}/decisions" for r in runs],
        "causes (all different)": [f"/runs/{r}/causes?layer_id=block3.conv&seed_id=1" for r in runs],
        "live": ["/health/live"],
    }


def load(wrk: str, url: str, paths: list[str], how: Load, seconds: int) -> dict[str, Any]:
    """Run wrk once."""
    command = [
        wrk,
        "-t2",
        f"-c{how.connections}",
        f"-d{seconds}s",
        "--timeout",
        "10s",
        "-s",
        str(SCRIPT),
        url,
        "--",
        str(how.pause_ms),
        *paths,
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds + 60).stdout
    seen: dict[str, Any] = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    return seen


def measure(stack: EmbeddedStack, folder: Path, wrk: str, seconds: int, loads: list[Load], **env: str) -> Found:
    """Measure all routes on one server."""
    found: Found = {}
    own = {"ESPER_URZA__POLL_S": "5", **env}  # so that the certifier hardly polls
    child = process(
        stack, folder, f"urza-{len(list(folder.iterdir()))}", str(SCRIPTS / "esper"), "serve", "urza", **own
    )
    with running(child, "urza.ready"):
        url = log_of(child).split("url=")[1].split()[0]
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200, READY_S, "Urza")
        wait_until(lambda: httpx.get(f"{url}/kernels?blueprint_id=affine").json()["items"], READY_S, "a kernel")
        server = psutil.Process(child.pid)
        for name, paths in routes(url).items():
            load(wrk, url, paths, loads[0], WARM_S)
            for how in loads:
                began, cpu = time.monotonic(), sum(server.cpu_times()[:2])
                seen = load(wrk, url, paths, how, seconds)
                seen["cpu"] = (sum(server.cpu_times()[:2]) - cpu) / (time.monotonic() - began)
                found[name, how] = seen
                _print_row(name, how, seen)
                wait_until(lambda: server.cpu_percent(0.2) < QUIET_PERCENT, READY_S, "the end of the load")
    return found


def _print_row(name: str, how: Load, seen: dict[str, Any]) -> None:
    print(
        f"{name:26s}{how!s:>12s}{seen['requests'] / seen['duration_us'] * 1e6:10,.0f}"
        + "".join(f"{seen[p] / 1000:9.1f}" for p in ("p50_us", "p95_us", "p99_us"))
        + f"{seen['refused']:8d}{seen['broken']:8d}{seen['cpu']:8.0%}",
        flush=True,
    )


async def time_queries(dsn: str, schema: str, at_once: int, rounds: int) -> None:
    """Measure each prepared statement on ``at_once`` concurrent connections."""
    async with asyncpg.create_pool(
        dsn, min_size=at_once, max_size=at_once, server_settings={"search_path": schema}
    ) as pool:
        known = {
            n: await pool.fetchval(f"SELECT event_id FROM {t} LIMIT 1")
            for n, t in (("event_id", "decisions"), ("event_ids", "blueprint_changes"))
        }
        values = {**OF_A_PAGE, **LATER, **known, "event_ids": [known["event_ids"]]}
        for sql_file, name in [("urza", n) for n in queries("urza").available_queries if not n.endswith("_cursor")] + [
            ("causes", "of_seed")
        ]:
            found = queries(sql_file)
            arguments = [values[p] for p in found.driver_adapter.var_sorted[name]]
            took = await _took(pool, getattr(found, name).sql, arguments, at_once, rounds)
            print(
                f"{name:26s}" + "".join(f"{took[int(len(took) * q)] * 1e3:9.2f}" for q in (0.5, 0.95, 0.99)),
                flush=True,
            )


async def _took(pool: Any, statement: str, arguments: list[Any], at_once: int, rounds: int) -> list[float]:
    took: list[float] = []

    async def query() -> None:
        async with pool.acquire() as connection:
            for n in range(rounds):
                began = time.perf_counter()
                await connection.fetch(statement, *arguments)
                if n >= rounds // 10:  # the first executions prepare the statement
                    took.append(time.perf_counter() - began)

    await asyncio.gather(*(query() for _ in range(at_once)))
    return sorted(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=1000, help="number of runs with rows in all tables; ten times as many have none"
    )
    parser.add_argument("--seconds", type=int, default=5, help="duration of the load on each route")
    parser.add_argument("--connections", type=int, default=1000, help="connections of the large loads")
    given = parser.parse_args()
    try:
        wrk = find_wrk()
    except ConfigError as error:
        sys.exit(str(error))
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        stack = exits.enter_context(running_stack())
        postgres = stack.settings().need_postgres()
        with psycopg.connect(stack.postgres.dsn) as connection:
            fill(connection, postgres.schema_name, given.runs)
        print(f"{'query (ms), 4 parallel':26s}{'p50':>9s}{'p95':>9s}{'p99':>9s}")
        asyncio.run(time_queries(stack.postgres.dsn, postgres.schema_name, at_once=4, rounds=100))
        exits.enter_context(running(worker(stack, folder), "worker.ready"))
        few, many = Load(FEW, 0), given.connections
        all_loads = [few, Load(many, PAUSE_MS), Load(many, 0)]
        found = {}
        for title, loads, env in (
            ("with cache", all_loads, {}),
            ("without cache", [few], {"ESPER_URZA__CACHE_MIB": "0"}),
        ):
            print(
                f"\n{title:26s}{'clients':>12s}{'rate/s':>10s}{'p50 ms':>9s}{'p95':>9s}{'p99':>9s}"
                f"{'refused':>8s}{'broken':>8s}{'CPU':>8s}"
            )
            found[title] = measure(stack, folder, wrk, given.seconds, loads, **env)
        print(f"\np95 without cache / with cache, {few} connections")
        for (name, how), seen in found["without cache"].items():
            print(f"{name:26s}{seen['p95_us'] / found['with cache'][name, how]['p95_us']:9.1f}")


if __name__ == "__main__":
    main()
