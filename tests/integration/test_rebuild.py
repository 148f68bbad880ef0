"""Rebuild, verify and status on the real stack: readers through a swap, kills, pasts, expired telemetry."""

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import TopicPartition
from conftest import running_stack
from processes import log_of, process, running, worker
from psycopg import sql
from typer.testing import CliRunner
from waiting import wait_until, wait_until_async

from esper.cli.app import app
from esper.config import PostgresSettings, Settings
from esper.embedded.stack import EmbeddedStack
from esper.oona.cloudevents import encode
from esper.oona.consumer import beginning_offsets, partition_of, read_range
from esper.oona.producer import OonaProducer
from esper.oona.topics import cluster_id
from esper.schemas import events, ids
from esper.schemas.assets import LayerNode
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.topics import RUNS, TELEMETRY, TOPICS
from esper.streams import lag
from esper.streams.database import connect, connect_pool
from esper.streams.folding import Batch, fold
from esper.streams.migrations import migrate
from esper.streams.positions import claim_cluster, stored_positions
from esper.streams.replay import Comparison, Until, drop_past, fold_past, pasts, rebuild, rebuilding, verify

pytestmark = pytest.mark.slow

LAYER = LayerNode(layer_id="fc1", kind="linear", num_features=8, num_parameters=72, num_seeds=1)


@pytest.fixture(scope="module")
def log() -> Iterator[EmbeddedStack]:
    """A stack whose log holds nothing but this module's runs."""
    with running_stack() as own:
        yield own


@pytest.fixture
def mine(log: EmbeddedStack, own_database_of: Callable[[EmbeddedStack], Any]) -> Settings:
    """Settings with that log, and a database of the test's own."""
    return Settings.model_validate({**log.sections(), "postgres": own_database_of(log)})


@pytest.fixture
def own_database_of() -> Callable[[EmbeddedStack], Any]:
    def made(stack: EmbeddedStack) -> PostgresSettings:
        name = f"t{uuid.uuid4().hex[:12]}"
        with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        own = PostgresSettings.model_validate({"dsn": stack.postgres.dsn_of(name)})
        migrate(own)
        return own

    return made


def told(run_id: str, sequence: int, event: type[events.TrainerEvent], **fields: Any) -> OonaMessage:
    body = event(run_id=run_id, incarnation=1, sequence=sequence, step=sequence, **fields)
    return OonaMessage.of(body, id=ids.trainer_event_id(run_id, 1, sequence), source="test")


def started(run_id: str) -> OonaMessage:
    return told(run_id, 0, events.RunStarted, model="Net", layers=(LAYER,), edges=(), boundary_steps=9,
                command_offset=0)  # fmt: skip


def epochs(run_id: str, numbers: range) -> list[OonaMessage]:
    """Epoch n has sequence n: so the highest sequence says how many rows there must be."""
    return [told(run_id, n, events.EpochCompleted, epoch=n, metrics={"val_accuracy": n / 1000}) for n in numbers]


def health(run_id: str, steps: range) -> list[OonaMessage]:
    signal = HealthSignal(layer_id="fc1", seed_id=0, chunk_id=0, epoch=0, health_score=0.5, activation_mean=0.25)
    return [told(run_id, n, events.LayerHealthMeasured, epoch=0, layer_id="fc1", signals=(signal,)) for n in steps]


async def send(settings: Settings, messages: list[OonaMessage]) -> None:
    async with OonaProducer(settings.need_kafka()) as producer:
        await producer.send_batch(messages)


async def fold_like_a_worker(settings: Settings) -> None:
    """Fold what is new in the log into the live rows."""
    kafka = settings.need_kafka()
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        await claim_cluster(connection, await cluster_id(kafka), kafka)
        stored, first = await stored_positions(connection), await beginning_offsets(kafka, TOPICS)
        for topic in (TELEMETRY, RUNS):
            starts = {n: stored.get((topic.name, n), first[topic.name, n]) for n in range(topic.num_partitions)}
            found: dict[int, list[Any]] = {}
            async for record in read_range(kafka, topic, start=starts):
                found.setdefault(record.position.partition, []).append(record)
            for partition, records in found.items():
                await fold(connection, Batch(topic.name, partition, starts[partition], tuple(records)))


@asynccontextmanager
async def live(settings: Settings) -> AsyncIterator[Any]:
    connection = await connect(settings.need_postgres(), settings.need_postgres().schema_name)
    try:
        yield connection
    finally:
        await connection.close()


async def different(settings: Settings) -> list[str]:
    return [c.table for c in await verify(settings) if not c.is_equal]


async def esper(settings: Settings, *arguments: str) -> tuple[int, str]:
    """The command line, in this process: exit code and all it printed."""
    env = {
        "ESPER_KAFKA__BOOTSTRAP_SERVERS": settings.need_kafka().bootstrap_servers,
        "ESPER_POSTGRES__DSN": settings.need_postgres().dsn.get_secret_value(),
        "COLUMNS": "200",
    }
    result = await asyncio.to_thread(CliRunner(env=env).invoke, app, list(arguments))
    shown = f"{result.exception}" if result.exception and not isinstance(result.exception, SystemExit) else ""
    return result.exit_code, result.output + shown


# readers, through swaps


async def count_rows(pool: Any, seen: dict[str, int]) -> None:
    """As the API reads: a statement at a time, on any connection of the pool."""
    for table in ("epochs", "health_windows", "layers"):
        count = await pool.fetchval(f"SELECT count(*) FROM {table}")
        assert count >= seen.get(table, 0), f"{table}: {count} rows after {seen[table]}"
        seen[table] = count


async def read_at_one_moment(pool: Any, seen: dict[str, int]) -> None:
    """As Tamiyo reads: several tables in one snapshot."""
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        highest = await connection.fetchval("SELECT last_sequence FROM progress WHERE topic = $1", RUNS.name)
        await asyncio.sleep(0.002)
        count, last = await connection.fetchrow("SELECT count(*), max(epoch) FROM epochs")
        assert (count, last) == (highest, highest), f"{count} epochs up to {last}, but {highest} were folded"
        assert highest >= seen.get("highest", 0)
        seen["highest"] = highest


async def read_by_cursor(pool: Any, _seen: dict[str, int]) -> None:
    """A statement that takes its time."""
    async with pool.acquire() as connection, connection.transaction():
        query = "SELECT epoch FROM epochs ORDER BY 1 LIMIT 200"
        found = [row["epoch"] async for row in connection.cursor(query, prefetch=50)]
        assert found == list(range(1, len(found) + 1))


@pytest.mark.timeout(300)
async def test_readers_see_no_error_and_never_fewer_rows_while_rebuilds_are_swapped_in(
    log: EmbeddedStack, tmp_path: Path
) -> None:
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
                assert all(num_reads[name] > before[name] for name in before), "somebody waited for the rebuild"
            ended.set()
        async with connect_pool(settings.need_postgres()) as pool:

            async def all_is_folded() -> bool:
                return await pool.fetchval("SELECT max(epoch) FROM epochs") == num_reads["sent"]

            await wait_until_async(all_is_folded, 60, "the worker, going on where the rebuild ended")
            assert await pool.fetchval("SELECT sum(num_signals) FROM health_windows") == num_reads["sent"]
        assert "partition.stopped" not in log_of(child)
    assert await different(settings) == []
    with psycopg.connect(log.postgres.dsn) as connection:
        left = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'esper%'").fetchall()
    assert left == [("esper",)]
    print(num_reads)


async def test_a_reader_in_an_old_snapshot_is_waited_for_and_ends_a_swap_that_would_wait_too_long(
    mine: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await send(mine, [started("patient"), *epochs("patient", range(1, 20))])
    await fold_like_a_worker(mine)
    monkeypatch.setattr(rebuilding, "SNAPSHOT_WAIT_S", 0.3)
    monkeypatch.setattr(rebuilding, "RETRY_S", 0.1)
    monkeypatch.setattr(rebuilding, "MAX_TRIES", 2)
    async with live(mine) as reader:
        async with reader.transaction(isolation="repeatable_read"):
            before = await reader.fetchval("SELECT count(*) FROM epochs")
            with pytest.raises(rebuilding.ConflictError, match=rf"process {reader.get_server_pid()} \("):
                await rebuild(mine)
            assert await reader.fetchval("SELECT count(*) FROM epochs") == before
        assert (await rebuild(mine)).is_swapped
        assert await reader.fetchval("SELECT count(*) FROM epochs") == before


async def test_rights_of_other_users_outlive_a_rebuild(mine: Settings) -> None:
    await send(mine, [started("rights"), *health("rights", range(1, 5))])
    await fold_like_a_worker(mine)
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
        assert await connection.fetchval(owner, day["name"]) == user, "whoever owns the table drops its days"
        await connection.execute("CREATE TABLE made_later (n integer)")
        await connection.execute(f"SET ROLE {user}")
        assert await connection.fetchval("SELECT count(*) FROM runs") >= 1
        assert await connection.fetchval("SELECT count(*) FROM made_later") == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("DELETE FROM runs")
        await connection.execute("RESET ROLE")


# verify, compare


async def test_verify_names_the_tables_and_the_rows_and_a_comparing_rebuild_swaps_only_what_is_accepted(
    mine: Settings,
) -> None:
    run_id = "altered"
    await send(mine, [started(run_id), *epochs(run_id, range(1, 30)), *health(run_id, range(1, 30))])
    await fold_like_a_worker(mine)
    assert (await rebuild(mine, comparison=Comparison())).is_swapped, "nothing differs"
    async with live(mine) as connection:
        await connection.execute("UPDATE epochs SET epoch = 99 WHERE run_id = $1 AND sequence = 7", run_id)
        await connection.execute("DELETE FROM epochs WHERE run_id = $1 AND sequence = 9", run_id)
        altered = "SELECT count(*) FROM epochs WHERE run_id = $1 AND epoch = 99"
        await connection.execute("UPDATE health_windows SET sum_health_score = sum_health_score + 1e-9 WHERE step = 16")
        code, printed = await esper(mine, "projections", "verify", "--show", "5")
        assert code == 1
        assert "live rows differ from the log in: epochs, health_windows" in printed
        assert f"epochs ({run_id},1,7)\n    epoch: live 99, by the log 7\n" in printed
        assert f"epochs ({run_id},1,9): only rebuilt from the log, not live" in printed
        assert "sum_health_score: live" in printed
        code, printed = await esper(mine, "projections", "rebuild", "--compare")
        assert code == 1
        assert "not swapped: the log says something else in: epochs, health_windows" in printed
        assert await connection.fetchval(altered, run_id) == 1, "live is as it was"
        code, printed = await esper(mine, "projections", "rebuild", "--compare", "--accept-changes")
        assert code == 0, printed
        assert await connection.fetchval(altered, run_id) == 0
    assert await different(mine) == []


# killed, interrupted


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_a_rebuild_that_is_killed_leaves_the_live_rows_and_the_next_one_cleans_up(
    mine: Settings, log: EmbeddedStack, tmp_path: Path, number: signal.Signals
) -> None:
    run_id = f"killed-{number.name.lower()}"
    await send(mine, [started(run_id), *epochs(run_id, range(1, 2_000))])
    await fold_like_a_worker(mine)
    postgres = mine.need_postgres()
    command = (sys.executable, "-m", "esper.cli.app", "projections", "rebuild")
    child = process(log, tmp_path, "rebuild", sys.executable, "-c", "from esper.cli.app import main; main()",
                    *command[3:], ESPER_POSTGRES__DSN=postgres.dsn.get_secret_value())  # fmt: skip
    async with live(mine) as connection:

        async def is_folding() -> bool:
            if await connection.fetchval("SELECT to_regclass('esper_rebuild.epochs')") is None:
                return False
            return bool(await connection.fetchval("SELECT count(*) > 0 FROM esper_rebuild.runs"))

        child.start()
        await wait_until_async(is_folding, 60, "a rebuild under way")
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


# pasts


async def test_the_past_is_folded_beside_the_present_up_to_a_time_or_an_offset_and_stays(mine: Settings) -> None:
    run_id, kafka = "past", mine.need_kafka()
    await send(mine, [started(run_id), *epochs(run_id, range(1, 11))])
    records = [r async for r in read_range(kafka, RUNS, partition=partition_of(run_id, RUNS)) if r.key == b"past"]
    now = datetime.now(UTC)
    await wait_until_async(lambda: asyncio.sleep(0, datetime.now(UTC).timestamp() > now.timestamp() + 0.05))
    await send(mine, [*epochs(run_id, range(11, 21)), *health(run_id, range(1, 21))])
    await fold_like_a_worker(mine)
    code, printed = await esper(mine, "projections", "rebuild", "--until", now.isoformat(), "--into", "at_noon")
    assert code == 0, printed
    place = f"{RUNS.name}[{records[4].position.partition}]@{records[4].position.offset}"
    await fold_past(mine, Until.parse([place]), "early")
    async with live(mine) as connection:

        async def counts(schema: str) -> tuple[int, int]:
            return (
                await connection.fetchval(f"SELECT count(*) FROM {schema}.epochs WHERE run_id = $1", run_id),
                await connection.fetchval(f"SELECT count(*) FROM {schema}.health_windows WHERE run_id = $1", run_id),
            )

        assert await counts("at_noon") == (10, 0), "every topic as of that time"
        assert await counts("early") == (3, 2), "that partition up to the offset, the others to the end"
        assert await counts("esper") == (20, 2)
        found = {past.schema: past for past in await pasts(mine)}
        assert set(found) == {"at_noon", "early"}
        assert (found["early"].told, found["early"].is_complete) == (place, True)
        code, printed = await esper(mine, "projections", "list")
        assert "at_noon" in printed
        assert now.isoformat() in printed
        code, printed = await esper(mine, "why", run_id, "fc1:0", "--schema", "at_noon")
        assert "nothing ever happened to seed fc1:0" in printed
        with pytest.raises(Exception, match="there is a schema 'early' already"):
            await fold_past(mine, Until.parse([place]), "early")
        with pytest.raises(Exception, match="'public' is no past of 'esper'; there are at_noon, early"):
            await drop_past(mine, "public")
        assert (await rebuild(mine)).is_swapped, "pasts are left alone"
        await drop_past(mine, "early")
        assert (await esper(mine, "projections", "drop", "at_noon"))[0] == 0
    assert await pasts(mine) == []


# what the log does not hold any more


async def expire(settings: Settings, run_id: str, before: int) -> None:
    """What retention does to telemetry, at once."""
    place = TopicPartition(TELEMETRY.name, partition_of(run_id, TELEMETRY))
    client = AIOKafkaAdminClient(bootstrap_servers=settings.need_kafka().bootstrap_servers)
    await client.start()
    await client.delete_records({place: RecordsToDelete(before)})
    await client.close()


async def test_expired_telemetry_and_dropped_days_are_not_compared_and_a_rebuild_keeps_them(mine: Settings) -> None:
    run_id = "expiring"
    await send(mine, [started(run_id), *health(run_id, range(1, 100))])
    await fold_like_a_worker(mine)
    assert await different(mine) == []
    records = [r async for r in read_range(mine.need_kafka(), TELEMETRY, partition=partition_of(run_id, TELEMETRY))]
    own = [r for r in records if r.key == run_id.encode()]
    await expire(mine, run_id, own[40].position.offset)  # in the midst of the window that begins at step 32
    query = "SELECT step, num_signals, first_offset FROM health_windows WHERE run_id = $1 ORDER BY step"
    async with live(mine) as connection:
        before = await connection.fetch(query, run_id)
        late = "INSERT INTO late_health_signals VALUES ($1, 1, 0, $2, $3, 0, now(), 90, 'fc1', 0, false, 0.5)"
        place = own[7].position
        await connection.execute(late, run_id, place.partition, place.offset)
        assert await different(mine) == []
        done = await rebuild(mine, comparison=Comparison())
        assert (done.is_swapped, done.num_taken_over) == (True, 3)
        assert await connection.fetch(query, run_id) == before, "windows whose start has expired are taken over whole"
        assert await connection.fetchval("SELECT count(*) FROM late_health_signals") == 1, "so are redriven signals"
        await send(mine, health(run_id, range(100, 120)))
        await fold_like_a_worker(mine)
        assert await different(mine) == []
        await connection.execute("UPDATE health_windows SET num_signals = 99 WHERE run_id = $1 AND step = 80", run_id)
        assert await different(mine) == ["health_windows"], "what lies inside the log still counts"
        (day,) = await connection.fetch("SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = "
                                        "'health_windows'::regclass")  # fmt: skip
        await connection.execute(
            "CREATE TABLE tomorrow PARTITION OF health_windows FOR VALUES FROM ('2200-01-01Z') TO ('2200-01-02Z')"
        )
        await connection.execute(f"DROP TABLE {day['name']}")
        assert await different(mine) == [], "rows older than live's oldest day do not count"


async def test_rows_that_the_log_cannot_give_again_are_kept(mine: Settings) -> None:
    """Postgres knows another cluster: a wiped broker, or the wrong address."""
    await send(mine, [started("kept")])
    await fold_like_a_worker(mine)
    async with live(mine) as connection:
        await connection.execute("UPDATE cluster SET cluster_id = 'another'")
        code, printed = await esper(mine, "projections", "verify")
        assert (code, "was folded from Kafka cluster another" in printed or "cluster another" in printed) == (2, True)
        code, printed = await esper(mine, "projections", "rebuild")
        assert code == 0, printed
        (past,) = await pasts(mine)
        assert past.schema in printed
        assert await connection.fetchval("SELECT count(*) FROM runs") == 0
        assert await connection.fetchval(f"SELECT count(*) FROM {past.schema}.runs WHERE run_id = 'kept'") == 1
        await drop_past(mine, past.schema)


async def test_rows_beyond_the_end_of_a_log_that_lost_records_are_kept(mine: Settings) -> None:
    await send(mine, [started("beyond")])
    await fold_like_a_worker(mine)
    async with live(mine) as connection:
        moved = "UPDATE positions SET next_offset = next_offset + 50 WHERE topic = $1 AND log_partition = $2"
        await connection.execute(moved, RUNS.name, partition_of("beyond", RUNS))
    (stopped,) = (await lag.standing(mine)).red
    assert "the broker lost records or was wiped" in (stopped.red or "")
    assert await different(mine) == ["positions"]
    kept_as = (await rebuild(mine)).kept_as
    assert [past.schema for past in await pasts(mine)] == [kept_as]
    assert await different(mine) == []


# status


async def test_status_tells_what_waits_what_stopped_and_who_is_away(mine: Settings) -> None:
    run_id, kafka = "standing", mine.need_kafka()
    await send(mine, [started(run_id), *epochs(run_id, range(1, 5))])
    await fold_like_a_worker(mine)
    await send(mine, epochs(run_id, range(5, 8)))
    record = encode(epochs(run_id, range(8, 9))[0])
    seen = await lag.standing(mine)
    (behind,) = [p for p in seen.partitions if p.lag]
    assert (behind.topic, behind.partition, behind.lag) == (RUNS.name, partition_of(run_id, RUNS), 3)
    assert behind.oldest_age_s is not None
    assert 0 <= behind.oldest_age_s < 60
    assert (seen.red, seen.log_trouble, seen.rows_trouble) == ((), None, None)
    await fold_like_a_worker(mine)
    headers = [(n, b"esper.epoch.completed.v99" if n == "ce_type" else v) for n, v in record.headers]
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    await producer.start()
    await producer.send_and_wait(record.topic, record.value, key=record.key, headers=headers)
    await producer.stop()
    async with live(mine) as connection:
        await connection.execute(
            "INSERT INTO pending_letters VALUES ($1, 0, 3, NULL, NULL, '[]', 0, 'larger than any')", RUNS.name
        )
    code, printed = await esper(mine, "projections", "status", "--json")
    found = json.loads(printed)
    assert code == 1
    assert [(p["topic"], "newer than" in p["red"]) for p in found["red"]] == [(RUNS.name, True)]
    assert found["refused"] == [{"topic": RUNS.name, "partition": 0, "offset": 3, "why": "larger than any"}]
    code, printed = await esper(mine, "projections", "status")
    assert "1 stopped" in printed
    assert "letter refused: system.runs[0] offset 3: larger than any" in printed
    no_broker = mine.model_copy(update={"kafka": kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})})
    code, printed = await esper(no_broker, "projections", "status")
    assert code == 2
    assert "the log is not known: no Kafka broker answers at 127.0.0.1:1" in printed
    assert RUNS.name in printed
    no_rows = Settings.model_validate({"kafka": kafka, "postgres": {"dsn": "postgresql://esper@127.0.0.1:1/esper"}})
    code, printed = await esper(no_rows, "projections", "status")
    assert code == 2
    assert "what is folded is not known: no Postgres answers at 127.0.0.1:1" in printed
    assert (await esper(no_broker, "projections", "rebuild"))[0] == 2
    assert (await esper(no_rows, "projections", "verify"))[0] == 2
