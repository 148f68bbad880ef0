"""Tamiyo's queries use indexes, and the cost of a poll does not grow with the history."""

import json
from collections.abc import AsyncIterator, Iterator
from datetime import date, timedelta
from typing import Any

import asyncpg
import pytest
from support.data.view_tables import Runs, analyzed, fill_library, fill_runs

from esper.config import PostgresSettings
from esper.graph.assembly import assemble
from esper.streams.database.health_window_partitions import make_partitions
from esper.streams.read_models.pending_boundaries import (
    decisions_without_command,
    is_complete,
    pending_boundaries,
)
from esper.streams.read_models.view_row_reader import read_many_view_rows, read_view_rows

NUM_ACTIVE = 8
BIG = (
    "boundaries", "decisions", "commands", "lifecycle", "epochs", "progress", "kernels", "blueprint_changes",
    "breaker_changes", "rejections", "telemetry_gaps", "layers", "edges", "runs", "incarnations", "health_windows", "views",
)  # fmt: skip


class Explaining:
    """A connection that executes queries and keeps each executed plan."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.nodes: list[dict[str, Any]] = []
        self._connection = connection
        self._count = 0

    async def fetch(self, query: str, *values: Any) -> Any:
        await self._explain(query, values)
        return await self._connection.fetch(query, *values)

    async def fetchrow(self, query: str, *values: Any) -> Any:
        await self._explain(query, values)
        return await self._connection.fetchrow(query, *values)

    async def fetchval(self, query: str, *values: Any) -> Any:
        await self._explain(query, values)
        return await self._connection.fetchval(query, *values)

    async def _explain(self, query: str, values: tuple[Any, ...]) -> None:
        self._count += 1
        name = f"plan{self._count}_{id(self)}"
        await self._connection.execute(f"PREPARE {name} AS {query}")
        given = f"({', '.join(literal(v) for v in values)})" if values else ""
        found = await self._connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE {name}{given}")
        self.nodes += nodes(json.loads(found)[0]["Plan"])

    @property
    def scanned_tables(self) -> set[str]:
        """The tables that a query read with a sequential scan."""
        return {n["Relation Name"] for n in self.nodes if n["Node Type"] == "Seq Scan"}

    @property
    def num_rows(self) -> int:
        """How many rows were read, including those that a filter removed."""
        filtered = ("Rows Removed by Filter", "Rows Removed by Index Recheck")
        scans = [n for n in self.nodes if "Relation Name" in n]
        return int(sum((n["Actual Rows"] + sum(n.get(f, 0) for f in filtered)) * n["Actual Loops"] for n in scans))


def literal(value: Any) -> str:
    """A parameter as SQL text; its type is the statement's."""
    if isinstance(value, timedelta):
        return f"'{value.total_seconds()} s'"
    if isinstance(value, list | tuple):
        return "'{" + ",".join(str(v) for v in value) + "}'"
    return f"'{value}'"


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.fixture
async def connection(own_database: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    """Active runs, runs that died long ago, a large library, and a history."""
    path = {"search_path": own_database.schema_name}
    found = await asyncpg.connect(own_database.dsn.get_secret_value(), server_settings=path)
    async with found.transaction():
        await make_partitions(found, [date(2026, 1, 1)])
    await fill_library(found, 500)
    await fill_runs(found, Runs("live", NUM_ACTIVE, "running", last_event_days=9))
    await fill_runs(found, Runs("dead", 200, "running", num_boundaries=4))
    await fill_runs(found, Runs("old", 2_000, num_boundaries=4))
    await analyzed(found)
    yield found
    await found.close()


async def polled(connection: asyncpg.Connection) -> Explaining:
    """One poll of Tamiyo."""
    explaining = Explaining(connection)
    pending = await pending_boundaries(explaining)
    assert [p.run_id for p in pending] == [f"live-{n}" for n in range(1, NUM_ACTIVE + 1)]
    assert all(p.is_complete and p.boundary == 60 for p in pending)
    assert await decisions_without_command(explaining) == []
    return explaining


@pytest.mark.timeout(180)
@pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
async def test_poll_and_view_queries_use_indexes(connection: asyncpg.Connection, plans: str) -> None:
    await connection.execute(f"SET plan_cache_mode = {plans}")
    before = await polled(connection)
    assert not before.scanned_tables.intersection(BIG)
    view = Explaining(connection)
    assert await is_complete(view, "live-3", 1, 60)
    seen = assemble(await read_view_rows(view, "live-3", 1, 60))
    assert (len(seen.layers), len(seen.kernels), seen.num_epochs) == (4, 500, 60)
    names = [(f"live-{n}", 1, 60) for n in range(1, NUM_ACTIVE + 1)]
    together = await read_many_view_rows(view, names)
    assert together[2] is not None
    assert assemble(together[2]).to_bytes() == seen.to_bytes(), "the rows of one boundary do not depend on the others"
    assert not {name for name in view.scanned_tables if name.startswith(BIG)}

    await fill_runs(connection, Runs("older", 6_000, num_boundaries=4))
    await fill_runs(connection, Runs("deader", 600, "running", num_boundaries=4))
    await analyzed(connection)
    after = await polled(connection)
    assert not after.scanned_tables.intersection(BIG)
    assert after.num_rows <= before.num_rows, "four times the history, but no more rows are read"
    assert after.num_rows <= 100 * NUM_ACTIVE
