"""The worker on the real stack: garbage, newer versions, wiped brokers, stalls. Kills: tests/faults."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from support.conditions import wait_until, wait_until_async
from support.processes.esper_processes import cli, log_of, running, worker

from esper.embedded.stack import EmbeddedStack
from esper.oona.cloudevents import encode
from esper.oona.dead_letters.dead_letter import read_dead_letter
from esper.oona.log_reader import StoredRecord, read_range
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.assets import LayerNode
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.topics import TELEMETRY, TOPICS, TopicSpec
from esper.schemas.upcasters import next_version

LAYER = LayerNode(layer_id="fc1", kind="linear", num_features=8, num_parameters=72, num_seeds=2)


def message(run_id: str, sequence: int, event: type[events.TrainerEvent], **fields: Any) -> OonaMessage:
    body = event(run_id=run_id, incarnation=1, sequence=sequence, **fields)
    return OonaMessage.of(body, id=ids.trainer_event_id(run_id, 1, sequence), source="test")


def run_messages(run_id: str, num_steps: int) -> list[OonaMessage]:
    """A run's start and its health, step by step."""
    started = message(
        run_id,
        0,
        events.RunStarted,
        step=0,
        model="Net",
        layers=(LAYER,),
        edges=(),
        boundary_steps=10,
        command_offset=0,
    )
    messages = [started]
    for step in range(1, num_steps + 1):
        signals = tuple(
            HealthSignal(
                layer_id="fc1", seed_id=n, chunk_id=n, epoch=0, health_score=0.7, activation_mean=0.1 * step + n
            )
            for n in range(2)
        )
        messages.append(
            message(run_id, step, events.LayerHealthMeasured, step=step, epoch=0, layer_id="fc1", signals=signals)
        )
    return messages


async def send(stack: EmbeddedStack, messages: list[OonaMessage]) -> None:
    async with OonaProducer(stack.settings().need_kafka()) as producer:
        await producer.send_batch(messages)


async def num_signals(stack: EmbeddedStack, run_id: str) -> int:
    connection = await asyncpg.connect(stack.postgres.dsn)
    try:
        query = "SELECT coalesce(sum(num_signals), 0)::bigint FROM esper.health_windows WHERE run_id = $1"
        return int(await connection.fetchval(query, run_id))
    finally:
        await connection.close()


async def test_worker_dead_letters_garbage_without_stalling(stack: EmbeddedStack, tmp_path: Path) -> None:
    run_id, garbage = f"clean-{uuid.uuid4().hex[:8]}", b"\x00not an event\xff"
    kafka = stack.settings().need_kafka()
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    await producer.start()
    for topic in TOPICS:
        for partition in range(topic.num_partitions):
            await producer.send_and_wait(
                topic.name, garbage, key=b"k\xff", partition=partition, headers=[("odd", b"\xfe")]
            )
    await producer.stop()
    with running(worker(stack, tmp_path), "worker.ready") as child:
        await send(stack, run_messages(run_id, 40))

        async def all_projected() -> bool:
            return await num_signals(stack, run_id) == 80

        await wait_until_async(all_projected, 30, "the events behind the garbage")
        assert "partition.stopped" not in log_of(child)
        for topic in TOPICS:

            async def dead_letters(topic: TopicSpec = topic) -> list[StoredRecord]:
                found = [r async for r in read_range(kafka, topic.dead_letters) if r.value == garbage]
                return found if len(found) >= topic.num_partitions else []

            mine = await wait_until_async(dead_letters, 30, f"the dead letters of {topic.name}")
            dead_letters = [read_dead_letter(r) for r in mine]
            assert {r.origin.partition for r in dead_letters} == set(range(topic.num_partitions))
            assert all(r.position.partition == r.origin.partition for r in dead_letters)
            assert {(r.reason, r.error, r.origin.topic, r.attempts) for r in dead_letters} == {
                ("bad_header", "DecodeError", topic.name, 1)
            }
            assert {(r.record.key, r.record.value, r.record.headers) for r in dead_letters} == {
                (b"k\xff", garbage, (("odd", b"\xfe"),))
            }


async def test_worker_stops_a_partition_at_a_newer_version(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    kafka = fresh_stack.settings().need_kafka()
    first, newer, behind = run_messages("newer", 2)[1], run_messages("newer", 2)[2], run_messages("newer", 3)[3]
    record = encode(newer)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    await producer.start()
    await send(fresh_stack, [first])
    headers = [(n, next_version(newer.data.type).encode() if n == "ce_type" else v) for n, v in record.headers]
    await producer.send_and_wait(record.topic, record.value, key=record.key, headers=headers)
    await producer.stop()
    await send(fresh_stack, [behind, *run_messages("other-run", 5)])
    with running(worker(fresh_stack, tmp_path), "worker.ready") as child:

        async def others_continue() -> bool:
            return await num_signals(fresh_stack, "other-run") == 10

        await wait_until_async(others_continue, 30, "the other partitions")
        wait_until(lambda: "partition.stopped" in log_of(child), 20, "the stopped partition")
        assert "newer than v2" in log_of(child)
    assert await num_signals(fresh_stack, "newer") == 2
    assert [r async for r in read_range(kafka, TELEMETRY.dead_letters)] == []


@pytest.mark.timeout(240)
async def test_worker_refuses_to_start_with_one_clear_error(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    await send(fresh_stack, run_messages("old", 5))
    with running(worker(fresh_stack, tmp_path), "worker.ready"):

        async def projected() -> bool:
            return await num_signals(fresh_stack, "old") == 10

        await wait_until_async(projected)
    fresh_stack.kafka.stop()
    fresh_stack.kafka.wipe()
    fresh_stack.kafka.start()
    refused = await refusal(fresh_stack, tmp_path, "no-topics")
    assert "topics are missing: telemetry.seed.health" in refused
    assert "esper topics apply" in refused
    code, printed = await asyncio.to_thread(cli, fresh_stack, tmp_path, "topics", "apply")
    assert code == 0, printed
    wiped, bad_key, no_broker = await asyncio.gather(
        refusal(fresh_stack, tmp_path, "wiped"),
        refusal(fresh_stack, tmp_path, "bad-key", ESPER_STREAMS__MEMBERID="1"),
        refusal(fresh_stack, tmp_path, "no-broker", ESPER_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1"),
    )
    assert "a wiped broker, or the wrong address" in wiped
    assert "esper projections rebuild" in wiped
    assert "unknown setting 'streams.memberid'; did you mean 'member_id'?" in bad_key
    assert "no Kafka broker answers at 127.0.0.1:1" in no_broker
    code, printed = await asyncio.to_thread(cli, fresh_stack, tmp_path, "projections", "rebuild")
    assert code == 0, printed
    with running(worker(fresh_stack, tmp_path, "again"), "worker.ready"):
        pass


async def refusal(stack: EmbeddedStack, folder: Path, name: str, **env: str) -> str:
    child = worker(stack, folder, name, **env)
    child.start()
    await asyncio.to_thread(wait_until, lambda: not child.is_alive, 60, "the refusal")
    assert child.returncode not in (0, None)
    return log_of(child)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_workers_share_partitions_and_take_over(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    with running(worker(fresh_stack, tmp_path, "first"), "worker.ready"):
        second = worker(fresh_stack, tmp_path, "second")
        with running(second, "worker.ready"):
            assert "partitions=96" not in log_of(second)
            assert "-1 " in log_of(second).split("instance=")[1][:200] or "-1" in log_of(second)
            for n in range(8):
                await send(fresh_stack, run_messages(f"shared-{n}", 30))

            async def all_projected() -> bool:
                counts = [await num_signals(fresh_stack, f"shared-{n}") for n in range(8)]
                return counts == [60] * 8

            await wait_until_async(all_projected, 60, "both workers' share")
            second.kill()
        await send(fresh_stack, [m for n in range(8, 16) for m in run_messages(f"shared-{n}", 30)])

        async def taken_over() -> bool:
            counts = [await num_signals(fresh_stack, f"shared-{n}") for n in range(8, 16)]
            return counts == [60] * 8

        await wait_until_async(taken_over, 90, "the survivor taking over")


@pytest.mark.slow
async def test_worker_reports_a_stall_with_offset_and_lag(stack: EmbeddedStack, tmp_path: Path) -> None:
    run_id = f"stuck-{uuid.uuid4().hex[:8]}"
    connection = await asyncpg.connect(stack.postgres.dsn)
    child = worker(stack, tmp_path, ESPER_STREAMS__STALLED_AFTER_S="1")

    def stalled() -> list[str]:
        lines = log_of(child).splitlines()
        return [line for line in lines if "worker.stalled" in line and f"topic={TELEMETRY.name}" in line]

    with running(child, "worker.ready"):
        async with connection.transaction():
            await connection.execute("LOCK TABLE esper.health_windows IN ACCESS EXCLUSIVE MODE")
            await send(stack, run_messages(run_id, 5))
            stalls = wait_until(stalled, 60, "the stall")
        assert "lag=5" in stalls[0]
        wait_until(lambda: "worker.recovered" in log_of(child), 60, "its end")

        async def projected() -> bool:
            return await num_signals(stack, run_id) == 10

        await wait_until_async(projected, 60)
    await connection.close()


async def test_worker_imports_neither_torch_nor_bare_packages(stack: EmbeddedStack, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; import esper.streams as s; s.app.finalize();"
        "print([m for m in ('torch', 'streams', 'schemas', 'services') if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert seen.stdout.strip() == "[]"
