"""Snapshots, expired telemetry, kept rows and the projection status, on the real stack."""

import asyncio
import json
from datetime import UTC, datetime

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import TopicPartition
from support.conditions import wait_until_async
from support.data.rebuild_runs import different, epochs, esper, health, live, project_new_records, send, started

from esper.config import Settings
from esper.oona.cloudevents import encode
from esper.oona.log_reader import partition_of, read_range
from esper.schemas.topics import RUNS, TELEMETRY
from esper.streams.read_models.projection_status import projection_status
from esper.streams.replay import ComparisonOptions, Cutoff, create_snapshot, drop_snapshot, list_snapshots, rebuild

pytestmark = pytest.mark.slow


# snapshots


async def test_snapshot_ends_at_a_time_or_an_offset(mine: Settings) -> None:
    run_id, kafka = "snapshot", mine.need_kafka()
    await send(mine, [started(run_id), *epochs(run_id, range(1, 11))])
    records = [r async for r in read_range(kafka, RUNS, partition=partition_of(run_id, RUNS)) if r.key == b"snapshot"]
    now = datetime.now(UTC)
    await wait_until_async(lambda: asyncio.sleep(0, datetime.now(UTC).timestamp() > now.timestamp() + 0.05))
    await send(mine, [*epochs(run_id, range(11, 21)), *health(run_id, range(1, 21))])
    await project_new_records(mine)
    code, printed = await esper(mine, "projections", "rebuild", "--until", now.isoformat(), "--into", "at_noon")
    assert code == 0, printed
    offset = f"{RUNS.name}[{records[4].position.partition}]@{records[4].position.offset}"
    await create_snapshot(mine, Cutoff.parse([offset]), "early")
    async with live(mine) as connection:

        async def counts(schema: str) -> tuple[int, int]:
            return (
                await connection.fetchval(f"SELECT count(*) FROM {schema}.epochs WHERE run_id = $1", run_id),
                await connection.fetchval(f"SELECT count(*) FROM {schema}.health_windows WHERE run_id = $1", run_id),
            )

        assert await counts("at_noon") == (10, 0), "every topic as of that time"
        assert await counts("early") == (3, 2), "that partition up to the offset, the others to the end"
        assert await counts("esper") == (20, 2)
        found = {snapshot.schema: snapshot for snapshot in await list_snapshots(mine)}
        assert set(found) == {"at_noon", "early"}
        assert (found["early"].description, found["early"].is_complete) == (offset, True)
        code, printed = await esper(mine, "projections", "list")
        assert "at_noon" in printed
        assert now.isoformat() in printed
        code, printed = await esper(mine, "why", run_id, "fc1:0", "--schema", "at_noon")
        assert "no events for seed fc1:0" in printed
        with pytest.raises(Exception, match="schema 'early' exists already"):
            await create_snapshot(mine, Cutoff.parse([offset]), "early")
        with pytest.raises(Exception, match="'public' is not a snapshot of 'esper'; choose one of at_noon, early"):
            await drop_snapshot(mine, "public")
        assert (await rebuild(mine)).is_swapped, "snapshots stay"
        await drop_snapshot(mine, "early")
        assert (await esper(mine, "projections", "drop", "at_noon"))[0] == 0
    assert await list_snapshots(mine) == []


# records that the log no longer has


async def expire(settings: Settings, run_id: str, before: int) -> None:
    """Delete telemetry records as retention does."""
    tp = TopicPartition(TELEMETRY.name, partition_of(run_id, TELEMETRY))
    client = AIOKafkaAdminClient(bootstrap_servers=settings.need_kafka().bootstrap_servers)
    await client.start()
    await client.delete_records({tp: RecordsToDelete(before)})
    await client.close()


async def test_rebuild_carries_over_expired_telemetry(mine: Settings) -> None:
    run_id = "expiring"
    await send(mine, [started(run_id), *health(run_id, range(1, 100))])
    await project_new_records(mine)
    assert await different(mine) == []
    records = [r async for r in read_range(mine.need_kafka(), TELEMETRY, partition=partition_of(run_id, TELEMETRY))]
    own = [r for r in records if r.key == run_id.encode()]
    await expire(mine, run_id, own[40].position.offset)  # inside the window that begins at step 32
    query = "SELECT step, num_signals, first_offset FROM health_windows WHERE run_id = $1 ORDER BY step"
    async with live(mine) as connection:
        before = await connection.fetch(query, run_id)
        late = "INSERT INTO late_health_signals VALUES ($1, 1, 0, $2, $3, 0, now(), 90, 'fc1', 0, false, 0.5)"
        position = own[7].position
        await connection.execute(late, run_id, position.partition, position.offset)
        assert await different(mine) == []
        done = await rebuild(mine, comparison=ComparisonOptions())
        assert (done.is_swapped, done.num_carried_over) == (True, 3)
        assert await connection.fetch(query, run_id) == before, (
            "windows whose start has expired are carried over completely"
        )
        assert await connection.fetchval("SELECT count(*) FROM late_health_signals") == 1, "so are late signals"
        await send(mine, health(run_id, range(100, 120)))
        await project_new_records(mine)
        assert await different(mine) == []
        await connection.execute("UPDATE health_windows SET num_signals = 99 WHERE run_id = $1 AND step = 80", run_id)
        assert await different(mine) == ["health_windows"], "rows whose records are in the log count"
        (day,) = await connection.fetch("SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = "
                                        "'health_windows'::regclass")  # fmt: skip
        await connection.execute(
            "CREATE TABLE tomorrow PARTITION OF health_windows FOR VALUES FROM ('2200-01-01Z') TO ('2200-01-02Z')"
        )
        await connection.execute(f"DROP TABLE {day['name']}")
        assert await different(mine) == [], "rows older than the oldest live day do not count"


async def test_rebuild_keeps_rows_of_another_cluster(mine: Settings) -> None:
    """The projections name another cluster: a wiped broker, or the wrong address."""
    await send(mine, [started("kept")])
    await project_new_records(mine)
    async with live(mine) as connection:
        await connection.execute("UPDATE cluster SET cluster_id = 'another'")
        code, printed = await esper(mine, "projections", "verify")
        assert (code, "the projections come from Kafka cluster another" in printed) == (2, True)
        code, printed = await esper(mine, "projections", "rebuild")
        assert code == 0, printed
        (snapshot,) = await list_snapshots(mine)
        assert snapshot.schema in printed
        assert await connection.fetchval("SELECT count(*) FROM runs") == 0
        assert await connection.fetchval(f"SELECT count(*) FROM {snapshot.schema}.runs WHERE run_id = 'kept'") == 1
        await drop_snapshot(mine, snapshot.schema)


async def test_rebuild_keeps_rows_beyond_the_end_of_the_log(mine: Settings) -> None:
    await send(mine, [started("beyond")])
    await project_new_records(mine)
    async with live(mine) as connection:
        moved = "UPDATE positions SET next_offset = next_offset + 50 WHERE topic = $1 AND log_partition = $2"
        await connection.execute(moved, RUNS.name, partition_of("beyond", RUNS))
    (stopped,) = (await projection_status(mine)).stopped
    assert "the broker lost records or was wiped" in (stopped.stop_reason or "")
    assert await different(mine) == ["positions"]
    kept_as = (await rebuild(mine)).kept_as
    assert [snapshot.schema for snapshot in await list_snapshots(mine)] == [kept_as]
    assert await different(mine) == []


# status


async def test_status_shows_lag_stops_and_unavailable_sides(mine: Settings) -> None:
    run_id, kafka = "standing", mine.need_kafka()
    await send(mine, [started(run_id), *epochs(run_id, range(1, 5))])
    await project_new_records(mine)
    await send(mine, epochs(run_id, range(5, 8)))
    record = encode(epochs(run_id, range(8, 9))[0])
    seen = await projection_status(mine)
    (behind,) = [p for p in seen.partitions if p.lag]
    assert (behind.topic, behind.partition, behind.lag) == (RUNS.name, partition_of(run_id, RUNS), 3)
    assert behind.oldest_age_s is not None
    assert 0 <= behind.oldest_age_s < 60
    assert (seen.stopped, seen.kafka_error, seen.postgres_error) == ((), None, None)
    await project_new_records(mine)
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
    assert [(p["topic"], "newer than" in p["stop_reason"]) for p in found["stopped"]] == [(RUNS.name, True)]
    assert found["refused"] == [{"topic": RUNS.name, "partition": 0, "offset": 3, "reason": "larger than any"}]
    code, printed = await esper(mine, "projections", "status")
    assert "1 stopped" in printed
    assert "dead letter refused by Kafka: system.runs[0] offset 3: larger than any" in printed
    no_broker = mine.model_copy(update={"kafka": kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})})
    code, printed = await esper(no_broker, "projections", "status")
    assert code == 2
    assert "Kafka is unavailable: no Kafka broker answers at 127.0.0.1:1" in printed
    assert RUNS.name in printed
    no_rows = Settings.model_validate({"kafka": kafka, "postgres": {"dsn": "postgresql://esper@127.0.0.1:1/esper"}})
    code, printed = await esper(no_rows, "projections", "status")
    assert code == 2
    assert "Postgres is unavailable: no Postgres answers at 127.0.0.1:1" in printed
    assert (await esper(no_broker, "projections", "rebuild"))[0] == 2
    assert (await esper(no_rows, "projections", "verify"))[0] == 2
