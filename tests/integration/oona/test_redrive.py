"""Dead letters from end to end: written by a worker with a bug, listed, redriven, projected once, replayed."""

import asyncio
import sys
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from support.conditions import wait_until_async
from support.processes.esper_processes import WORKER, cli, log_of, process, running, worker

from esper.embedded.stack import EmbeddedStack
from esper.errors import DecodeError
from esper.oona.cloudevents import encode
from esper.oona.dead_letters.dead_letter import ATTEMPTS_HEADER, ORIGIN_HEADER, PROJECTIONS, dead_letter, first_origin
from esper.oona.dead_letters.redrive import Condition, find_dead_letters
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.oona.records import RECORD_LIMIT_BYTES, Record
from esper.schemas import events, ids
from esper.schemas.assets import LayerNode
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.topics import REDRIVES, RUNS, TELEMETRY

pytestmark = pytest.mark.slow

# a worker with a bug that was fixed later: it cannot decode epochs and health
BUGGY = """
import sys
from esper.errors import DecodeError
from esper.oona import cloudevents
from esper.streams.projectors import health_report_decoder

original = cloudevents._event
def with_a_bug(entry, *rest):
    if entry.type.startswith(("esper.epoch.completed", "esper.layer-health.measured")):
        raise DecodeError("invalid", "this reader has a bug")
    return original(entry, *rest)
cloudevents._event = with_a_bug
health_report_decoder.read_report = lambda record: None  # health is decoded by cloudevents too
sys.argv[0] = "faust"
from faust.cli.faust import cli
cli()
"""
LAYER = LayerNode(layer_id="fc1", kind="linear", num_features=8, num_parameters=72, num_seeds=2)


def run_event(run_id: str, sequence: int, event: type[events.TrainerEvent], **fields: Any) -> OonaMessage:
    body = event(run_id=run_id, incarnation=1, sequence=sequence, step=sequence, **fields)
    return OonaMessage.of(body, id=ids.trainer_event_id(run_id, 1, sequence), source="test")


def story(run_id: str) -> list[OonaMessage]:
    """A run with three epochs, one boundary behind them."""
    started = run_event(run_id, 0, events.RunStarted, model="Net", layers=(LAYER,), edges=(), boundary_steps=9,
                   command_offset=0)  # fmt: skip
    epochs = [run_event(run_id, n, events.EpochCompleted, epoch=n, metrics={"val_accuracy": n / 10}) for n in (1, 2, 3)]
    return [started, *epochs, run_event(run_id, 4, events.BoundaryReached, boundary=1, epoch=3, last_sequences={})]


async def rows(stack: EmbeddedStack, query: str, *arguments: object) -> list[Any]:
    connection = await asyncpg.connect(stack.postgres.dsn)
    try:
        return [tuple(r) for r in await connection.fetch(query, *arguments)]
    finally:
        await connection.close()


@pytest.mark.timeout(240)
async def test_redrive_applies_a_record_once_and_replay_agrees(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    kafka, run_id = fresh_stack.settings().need_kafka(), f"epochs-{uuid.uuid4().hex[:8]}"
    garbage = Record(RUNS.name, None, b"\x00\xff", (), 0, partition=0)
    async with OonaProducer(kafka) as producer:
        await producer.send_batch(story(run_id))
        await producer.send_records([garbage, garbage._replace(value=None)])

    async def is_projected_and_sent() -> bool:
        folded = await rows(fresh_stack, "SELECT 1 FROM esper.boundaries WHERE run_id = $1", run_id)
        return bool(folded) and not await rows(fresh_stack, "SELECT 1 FROM esper.pending_letters")

    buggy = process(fresh_stack, tmp_path, "buggy", sys.executable, "-c", BUGGY, *WORKER[1:])
    with running(buggy, "worker.ready"):
        await wait_until_async(is_projected_and_sent, 90, "the unaffected events, and the dead letters")

    def run(*arguments: str) -> str:
        code, printed = cli(fresh_stack, tmp_path, *arguments, COLUMNS="200")
        assert code == 0, printed
        return printed

    async def esper(*arguments: str) -> str:
        return await asyncio.to_thread(run, *arguments)

    dead_letters = [x async for x in find_dead_letters(kafka, [RUNS])]
    mine = [x for x in dead_letters if x.record.key == run_id.encode()]
    originals = {r.position: r async for r in read_range(kafka, RUNS)}
    assert len(mine) == 3
    for letter in dead_letters:
        origin = originals[letter.origin]
        assert letter.record[1:4] == (origin.key, origin.value, origin.headers), "byte for byte"
        assert letter.position.partition == letter.origin.partition
    assert {(x.reason, x.error, x.attempts) for x in mine} == {("invalid", "DecodeError", 1)}
    assert all("this reader has a bug" in x.trace for x in mine)

    listed = await esper("dlq", "list")
    assert listed.count(run_id) == 3
    place = f"{mine[0].position.partition}@{mine[0].position.offset}"
    shown = await esper("dlq", "show", RUNS.name, place)
    assert "this version can decode it: redrive it" in shown
    assert f"{RUNS.name}[{mine[0].origin.partition}] offset {mine[0].origin.offset}" in shown
    assert "3 would be redriven" in await esper("dlq", "redrive", "--dry-run")
    assert [r async for r in read_range(kafka, REDRIVES)] == []

    with running(worker(fresh_stack, tmp_path), "worker.ready"):
        assert "2 still cannot be decoded" in await esper(
            "dlq", "redrive", "--where", "topic=system.runs", "--limit", "2"
        )
        assert "1 redriven" in await esper("dlq", "redrive", "--where", f"key~{run_id[:9]}", "--reason", "mended")
        assert "nothing to redrive" in await esper("dlq", "redrive")
        assert "3 redriven" in await esper("dlq", "redrive", "--again", "--where", f"key={run_id}")
        async with OonaProducer(kafka) as producer:
            await producer.send(run_event(run_id, 5, events.CheckpointSaved, epoch=3, sha256="0" * 64, size_bytes=1,
                                     command_offset=0))  # fmt: skip

        async def all_is_folded() -> bool:
            saved = await rows(fresh_stack, "SELECT 1 FROM esper.checkpoints WHERE run_id = $1", run_id)
            return bool(saved) and len(await rows(fresh_stack, "SELECT 1 FROM esper.redrives")) == 6

        await wait_until_async(all_is_folded, 30, "the event after the redrive")
        folded = await rows(fresh_stack, "SELECT epoch, step FROM esper.epochs WHERE run_id = $1 ORDER BY 1", run_id)
        assert folded == [(1, 1), (2, 2), (3, 3)]
        assert await rows(fresh_stack, "SELECT step FROM esper.runs WHERE run_id = $1", run_id) == [(4,)]
        assert await rows(fresh_stack, "SELECT 1 FROM esper.pending_letters") == []
        assert "live and rebuilt are equal" in await esper("projections", "verify")
        assert "rebuilt from" in await esper("projections", "rebuild")
        assert "live and rebuilt are equal" in await esper("projections", "verify")
    again = await rows(fresh_stack, "SELECT epoch, step FROM esper.epochs WHERE run_id = $1 ORDER BY 1", run_id)
    assert again == folded
    origins = [(first_origin(r.headers, r.position), r.position) async for r in read_range(kafka, RUNS)]
    assert sorted(first for first, here in origins if first != here) == sorted([x.origin for x in mine] * 2)


async def test_duplicate_dead_letter_is_redriven_once(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    """The log after a worker that crashed between sending its dead letters and deleting them."""
    kafka = fresh_stack.settings().need_kafka()
    async with OonaProducer(kafka) as producer:
        await producer.send_batch(story("again"))
        records = [r async for r in read_range(kafka, RUNS)][1:3]
        dead_letters = [dead_letter(r, DecodeError("invalid", "a bug"), PROJECTIONS) for r in records]
        await producer.send_records(dead_letters * 2)

    async def dlq(*arguments: str) -> str:
        code, printed = await asyncio.to_thread(cli, fresh_stack, tmp_path, "dlq", *arguments, COLUMNS="200")
        assert code == 0, printed
        return printed

    assert "2 system.runs: invalid" in await dlq("list")
    assert "1 redriven" in await dlq("redrive", "--limit", "1")
    assert "1 redriven" in await dlq("redrive")
    assert "2 already redriven" in await dlq("redrive")


async def test_undecodable_redrive_keeps_its_first_origin(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    kafka = fresh_stack.settings().need_kafka()
    broken = encode(story("broken")[1])._replace(value=b'{"type": "esper.epoch.completed.v1"}')
    async with OonaProducer(kafka) as producer:
        await producer.send_records([broken])
    with running(worker(fresh_stack, tmp_path), "worker.ready"):

        async def dead_letters(count: int) -> list[Any]:
            found = [x async for x in find_dead_letters(kafka, [RUNS])]
            return found if len(found) == count else []

        (first,) = await wait_until_async(lambda: dead_letters(1), 30, "the dead letter")
        code, printed = await asyncio.to_thread(cli, fresh_stack, tmp_path, "dlq", "redrive", "--undecodable")
        assert code == 0, printed
        _first, second = await wait_until_async(lambda: dead_letters(2), 30, "the second dead letter")
    assert (second.attempts, second.first_origin) == (2, first.origin)
    assert second.origin.offset > first.origin.offset
    assert (second.record.key, second.record.value) == (first.record.key, first.record.value)


async def test_forged_headers_redirect_nothing_and_stop_no_worker(stack: EmbeddedStack, tmp_path: Path) -> None:
    """Records of other clients: a forged origin, endless numbers, and one too large for a dead letter."""
    kafka, run_id = stack.settings().need_kafka(), f"forged-{uuid.uuid4().hex[:8]}"
    started, *_others = story(run_id)
    good = encode(started)
    forged = [
        (ORIGIN_HEADER, b"control.kasmina.commands/1/0"),
        (ORIGIN_HEADER, b"system.runs/0/" + b"9" * 5_000),
        (ATTEMPTS_HEADER, b"7" * 5_000),
    ]
    broken = [good._replace(value=b"{}", headers=(*good.headers, header)) for header in forged]
    valid = [encode(m)._replace(headers=(*encode(m).headers, forged[1])) for m in story(run_id)[1:]]
    async with OonaProducer(kafka) as producer:
        await producer.send_records([good, *broken, *valid])
    client = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, max_request_size=2**23)
    await client.start()
    await client.send_and_wait(RUNS.name, b"x" * (RECORD_LIMIT_BYTES + 50_000), key=run_id.encode())
    await client.stop()

    async def dead_letters() -> list[Any]:
        found = [x async for x in find_dead_letters(kafka, [RUNS], [Condition("key", run_id, is_substring=False)])]
        return found if len(found) == 4 else []

    for name in ("first", "second"):  # a record that stopped one worker would stop every later one
        with running(worker(stack, tmp_path, name), "worker.ready") as child:
            mine = await wait_until_async(dead_letters, 30, "the dead letters")
            assert "partition.stopped" not in log_of(child)
    assert await rows(stack, "SELECT 1 FROM esper.boundaries WHERE run_id = $1", run_id), "the events after them"
    assert {x.first_origin for x in mine} == {x.origin for x in mine}, "no header moves a record"
    assert max(len(x.record.value or b"") for x in mine) > RECORD_LIMIT_BYTES


async def test_event_with_two_dead_letters_is_projected_once(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    """A killed trainer sends an event again; a worker with a bug skips both records; both are redriven."""
    kafka, run_id = fresh_stack.settings().need_kafka(), "twice"
    signal = HealthSignal(layer_id="fc1", seed_id=0, chunk_id=0, epoch=0, health_score=0.5)
    measured = run_event(run_id, 1, events.LayerHealthMeasured, epoch=0, layer_id="fc1", signals=(signal,))
    async with OonaProducer(kafka) as producer:
        await producer.send_batch([measured, measured])

    async def dead_letters() -> list[Any]:
        found = [x async for x in find_dead_letters(kafka, [TELEMETRY])]
        return found if len(found) == 2 else []

    buggy = process(fresh_stack, tmp_path, "buggy", sys.executable, "-c", BUGGY, *WORKER[1:])
    with running(buggy, "worker.ready"):
        await wait_until_async(dead_letters, 30, "both dead letters")
    code, printed = await asyncio.to_thread(cli, fresh_stack, tmp_path, "projections", "rebuild")
    assert code == 0, printed
    with running(worker(fresh_stack, tmp_path), "worker.ready"):
        code, printed = await asyncio.to_thread(cli, fresh_stack, tmp_path, "dlq", "redrive")
        assert "2 redriven" in printed, printed

        async def is_folded() -> bool:
            positions = await rows(
                fresh_stack, "SELECT next_offset FROM esper.positions WHERE topic = $1", TELEMETRY.name
            )
            return (4,) in positions

        await wait_until_async(is_folded, 30, "both redriven records")
        folded = await rows(fresh_stack, "SELECT num_signals FROM esper.health_windows WHERE run_id = $1", run_id)
        assert folded == [(1,)]
        code, printed = await asyncio.to_thread(cli, fresh_stack, tmp_path, "projections", "verify")
    assert code == 0, printed
