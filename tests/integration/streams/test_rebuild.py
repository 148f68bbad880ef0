"""Rebuild and verify on the real stack: readers during a swap, kills, privileges."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from support.conditions import wait_until, wait_until_async
from support.data.rebuild_runs import different, epochs, esper, health, live, project_new_records, send, started
from support.processes.esper_processes import log_of, process, running, worker

from esper.config import Settings
from esper.embedded.stack import EmbeddedStack
from esper.errors import ConflictError
from esper.oona.producer import OonaProducer
from esper.schemas.topics import RUNS
from esper.streams.database.connections import connect_pool
from esper.streams.replay import ComparisonOptions, projection_rebuild, rebuild

pytestmark = pytest.mark.slow


# readers, through swaps


async def count_rows(pool: Any, seen: dict[str, int]) -> None:
    """Read like the API: single statements on any connection of the pool."""
    for table in ("epochs", "health_windows", "layers"):
        count = await pool.fetchval(f"SELECT count(*) FROM {table}")
        assert count >= seen.get(table, 0), f"{table}: {count} rows after {seen[table]}"
        seen[table] = count


async def read_at_one_moment(pool: Any, seen: dict[str, int]) -> None:
    """Read like Tamiyo: several tables in one snapshot."""
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        highest = await connection.fetchval("SELECT last_sequence FROM progress WHERE topic = $1", RUNS.name)
        await asyncio.sleep(0.002)
        count, last = await connection.fetchrow("SELECT count(*), max(epoch) FROM epochs")
        assert (count, last) == (highest, highest), f"{count} epochs up to {last}, but {highest} were projected"
        assert highest >= seen.get("highest", 0)
        seen["highest"] = highest


async def read_by_cursor(pool: Any, _seen: dict[str, int]) -> None:
    """A slow statement."""
    async with pool.acquire() as connection, connection.transaction():
        query = "SELECT epoch FROM epochs ORDER BY 1 LIMIT 200"
        found = [row["epoch"] async for row in connection.cursor(query, prefetch=50)]
        assert found == list(range(1, len(found) + 1))


@pytest.mark.timeout(300)
async def test_rebuild_swap_is_invisible_to_readers(log: EmbeddedStack, tmp_path: Path) -> None:
    settings, run_id, ended = log.settings(), "watched", asyncio.Event()
    await send(settings, [started(run_id), *epochs(run_id, range(1, 200)), *health(run_id, range(1, 200))])
    num_reads = dict.fromkeys(("rows", "moment", "cursor", "prepared", "sent"), 0)

    async def keep(name: str, read: Callable[[Any, dict[str, int]], Awaitable[None]], pool: Any) -> None:
        seen: dict[str, int] = {}
        while not ended.is_set():
            await read(pool, seen)
            num_reads[name] += 1

    async def keep_prepared(pool: Any) -> None:
        async with pool.acquire() as connection:
            statement, before = await connection.prepare("SELECT count(*), max(epoch) FROM epochs"), 0
            while not ended.is_set():
                count, last = await statement.fetchrow()
                assert count == last >= before
                before, num_reads["prepared"] = count, num_reads["prepared"] + 1

    async def keep_sending() -> None:
        async with OonaProducer(settings.need_kafka()) as producer:
            for n in range(200, 100_000):
                if ended.is_set():
                    return
                await producer.send_batch([*epochs(run_id, range(n, n + 1)), *health(run_id, range(n, n + 1))])
                num_reads["sent"] = n
                await asyncio.sleep(0.02)

    with running(worker(log, tmp_path), "worker.ready") as child:
        async with connect_pool(settings.need_postgres()) as pool, asyncio.TaskGroup() as group:
            await wait_until_async(lambda: pool.fetchval("SELECT count(*) > 150 FROM epochs"), 60, "the first rows")
            for name, read in (("rows", count_rows), ("rows", count_rows), ("moment", read_at_one_moment),
                               ("moment", read_at_one_moment), ("cursor", read_by_cursor)):  # fmt: skip
                group.create_task(keep(name, read, pool))
            group.create_task(keep_prepared(pool))
            group.create_task(keep_sending())
            for _n in range(2):
                before = num_reads.copy()
                assert (await rebuild(settings)).is_swapped
                assert all(num_reads[name] > before[name] for name in before), "a reader waited for the rebuild"
            ended.set()
        async with connect_pool(settings.need_postgres()) as pool:

            async def all_is_projected() -> bool:
                return await pool.fetchval("SELECT max(epoch) FROM epochs") == num_reads["sent"]

            await wait_until_async(all_is_projected, 60, "the worker, which continues where the rebuild ended")
            assert await pool.fetchval("SELECT sum(num_signals) FROM health_windows") == num_reads["sent"]
        assert "partition.stopped" not in log_of(child)
    assert await different(settings) == []
    with psycopg.connect(log.postgres.dsn) as connection:
        left = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'esper%'").fetchall()
    assert left == [("esper",)]
    print(num_reads)


async def test_rebuild_waits_for_old_snapshots_then_gives_up(mine: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    await send(mine, [started("patient"), *epochs("patient", range(1, 20))])
    await project_new_records(mine)
    monkeypatch.setattr(projection_rebuild, "SNAPSHOT_WAIT_S", 0.3)
    monkeypatch.setattr(projection_rebuild, "RETRY_S", 0.1)
    monkeypatch.setattr(projection_rebuild, "MAX_TRIES", 2)
    async with live(mine) as reader:
        async with reader.transaction(isolation="repeatable_read"):
            before = await reader.fetchval("SELECT count(*) FROM epochs")
            with pytest.raises(ConflictError, match=rf"process {reader.get_server_pid()} \("):
                await rebuild(mine)
            assert await reader.fetchval("SELECT count(*) FROM epochs") == before
        assert (await rebuild(mine)).is_swapped
        assert await reader.fetchval("SELECT count(*) FROM epochs") == before


async def test_rebuild_keeps_privileges_of_other_users(mine: Settings) -> None:
    await send(mine, [started("rights"), *health("rights", range(1, 5))])
    await project_new_records(mine)
    user = f"reader_{os.getpid()}"
    async with live(mine) as connection:
        await connection.execute(f"CREATE ROLE {user} LOGIN")
        await connection.execute(f"GRANT USAGE ON SCHEMA esper TO {user}")
        await connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA esper TO {user}")
        await connection.execute(f"ALTER DEFAULT PRIVILEGES IN SCHEMA esper GRANT SELECT ON TABLES TO {user}")
        await connection.execute(f"ALTER TABLE health_windows OWNER TO {user}")
        (day,) = await connection.fetch("SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = "
                                        "'health_windows'::regclass")  # fmt: skip
        await connection.execute(f"DROP TABLE {day['name']}")
        assert (await rebuild(mine)).is_swapped
        owner = "SELECT tableowner FROM pg_tables WHERE schemaname = 'esper' AND tablename = $1"
        assert await connection.fetchval(owner, day["name"]) == user, "the owner of the table owns its partitions"
        await connection.execute("CREATE TABLE made_later (n integer)")
        await connection.execute(f"SET ROLE {user}")
        assert await connection.fetchval("SELECT count(*) FROM runs") >= 1
        assert await connection.fetchval("SELECT count(*) FROM made_later") == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("DELETE FROM runs")
        await connection.execute("RESET ROLE")


# verify, compare


async def test_verify_and_rebuild_compare_show_differing_rows(
    mine: Settings,
) -> None:
    run_id = "altered"
    await send(mine, [started(run_id), *epochs(run_id, range(1, 30)), *health(run_id, range(1, 30))])
    await project_new_records(mine)
    assert (await rebuild(mine, comparison=ComparisonOptions())).is_swapped, "nothing differs"
    async with live(mine) as connection:
        await connection.execute("UPDATE epochs SET epoch = 99 WHERE run_id = $1 AND sequence = 7", run_id)
        await connection.execute("DELETE FROM epochs WHERE run_id = $1 AND sequence = 9", run_id)
        altered = "SELECT count(*) FROM epochs WHERE run_id = $1 AND epoch = 99"
        await connection.execute("UPDATE health_windows SET sum_health_score = sum_health_score + 1e-9 WHERE step = 16")
        code, printed = await esper(mine, "projections", "verify", "--show", "5")
        assert code == 1
        assert "live rows differ from the log in: epochs, health_windows" in printed
        assert f"epochs ({run_id},1,7)\n    epoch: live 99, rebuilt 7\n" in printed
        assert f"epochs ({run_id},1,9): in the log, not in the live table" in printed
        assert "sum_health_score: live" in printed
        code, printed = await esper(mine, "projections", "rebuild", "--compare")
        assert code == 1
        assert "not swapped: live rows differ from the log in: epochs, health_windows" in printed
        assert await connection.fetchval(altered, run_id) == 1, "live is as it was"
        code, printed = await esper(mine, "projections", "rebuild", "--compare", "--accept-changes")
        assert code == 0, printed
        assert await connection.fetchval(altered, run_id) == 0
    assert await different(mine) == []


# killed, interrupted


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_rebuild_killed_leaves_live_rows_intact(
    mine: Settings, log: EmbeddedStack, tmp_path: Path, number: signal.Signals
) -> None:
    run_id = f"killed-{number.name.lower()}"
    await send(mine, [started(run_id), *epochs(run_id, range(1, 2_000))])
    await project_new_records(mine)
    postgres = mine.need_postgres()
    command = (sys.executable, "-m", "esper.cli.app", "projections", "rebuild")
    child = process(log, tmp_path, "rebuild", sys.executable, "-c", "from esper.cli.app import main; main()",
                    *command[3:], ESPER_POSTGRES__DSN=postgres.dsn.get_secret_value())  # fmt: skip
    async with live(mine) as connection:

        async def has_in_flight() -> bool:
            if await connection.fetchval("SELECT to_regclass('esper_rebuild.epochs')") is None:
                return False
            return bool(await connection.fetchval("SELECT count(*) > 0 FROM esper_rebuild.runs"))

        child.start()
        await wait_until_async(has_in_flight, 60, "a rebuild under way")
        os.kill(child.pid, number)
        await asyncio.to_thread(wait_until, lambda: not child.is_alive, 30, "its end")
        assert await connection.fetchval("SELECT count(*) FROM epochs WHERE run_id = $1", run_id) == 1_999
        if number is signal.SIGINT:
            assert (child.returncode, log_of(child).splitlines()[-1]) == (130, "esper: interrupted")
            assert await connection.fetchval("SELECT to_regclass('esper_rebuild.epochs')") is None
        assert (await rebuild(mine)).is_swapped
        assert await connection.fetchval("SELECT count(*) FROM epochs WHERE run_id = $1", run_id) == 1_999
        names = await connection.fetch("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'esper%'")
        assert [name for (name,) in names] == ["esper"]
