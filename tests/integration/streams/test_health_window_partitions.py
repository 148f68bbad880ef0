"""Daily partitions of health windows: created by the first worker that needs one, dropped when expired."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from support.conditions import wait_until_async
from support.processes.esper_processes import worker

from esper.config import PostgresSettings
from esper.embedded.stack import EmbeddedStack
from esper.streams.database.health_window_partitions import TABLE, drop_expired, make_partitions, partition_name

NOW = datetime(2026, 11, 20, 15, tzinfo=UTC)


async def connected(postgres: PostgresSettings) -> Any:
    path = {"search_path": postgres.schema_name}
    return await asyncpg.connect(postgres.dsn.get_secret_value(), server_settings=path)


async def partitions(connection: Any) -> set[str]:
    query = "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = to_regclass($1)"
    return {row["name"] for row in await connection.fetch(query, TABLE)}


async def test_make_partitions_concurrent_workers_all_succeed(own_database: PostgresSettings) -> None:
    connections = [await connected(own_database) for _ in range(4)]
    days = [NOW.date() + timedelta(days=n) for n in range(12)]

    async def make_partition(connection: Any, day: Any) -> None:
        async with connection.transaction():
            await make_partitions(connection, [day])
            await connection.fetchval("SELECT 1")

    for day in days:
        await asyncio.gather(*(make_partition(connection, day) for connection in connections))
    assert await partitions(connections[0]) == {partition_name(day) for day in days}
    for connection in connections:
        await connection.close()


async def test_drop_expired_drops_only_whole_days(own_database: PostgresSettings) -> None:
    connection, busy = await connected(own_database), await connected(own_database)
    days = [NOW.date() - timedelta(days=n) for n in range(4)]
    await make_partitions(connection, days)
    async with busy.transaction():  # a long transaction blocks the drop, which gives up and does not disturb it
        await busy.execute(f"SELECT count(*) FROM {TABLE}")
        assert await drop_expired(connection, NOW) == []
    assert await drop_expired(connection, NOW - timedelta(days=1)) == [partition_name(d) for d in (days[3], days[2])]
    assert await partitions(connection) == {partition_name(d) for d in days[:2]}
    await connection.close()
    await busy.close()


async def test_drop_expired_deletes_late_signals_of_same_days(own_database: PostgresSettings) -> None:
    connection = await connected(own_database)
    first_kept = NOW.replace(hour=0)
    times = (first_kept - timedelta(days=9), first_kept - timedelta(microseconds=1), first_kept, NOW)
    for offset, logged_at in enumerate(times):
        await connection.execute(
            "INSERT INTO late_health_signals VALUES ('r', 1, 0, 0, $1, 0, $2, 5, 'fc1', 0, false, 0.5)",
            offset,
            logged_at,
        )
    await drop_expired(connection, NOW)
    kept = await connection.fetch("SELECT logged_at FROM late_health_signals ORDER BY log_offset")
    assert [row["logged_at"] for row in kept] == list(times[2:])
    await connection.close()


@pytest.mark.timeout(240)
@pytest.mark.slow
async def test_worker_drops_expired_partitions(fresh_stack: EmbeddedStack, tmp_path: Any) -> None:
    connection = await connected(fresh_stack.settings().need_postgres())
    old, today = NOW.date() - timedelta(days=400), datetime.now(UTC).date()
    await make_partitions(connection, [old, today])
    child = worker(fresh_stack, tmp_path, "dropping")
    child.start()
    try:

        async def is_dropped() -> bool:
            return await partitions(connection) == {partition_name(today)}

        await wait_until_async(is_dropped, 60, "the old partition is gone")
    finally:
        child.stop()
        await connection.close()
