"""`esper storage verify` and `gc` on real projections: referenced blobs are checked, and never collected."""

import asyncio
import json
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from support.conditions import wait_until
from support.data.stored_blobs import folder_of, some_bytes, store_long_ago
from support.events.event_examples import BY_TYPE, KERNEL
from support.processes.esper_processes import running, worker
from typer.testing import CliRunner

from esper.cli.app import app
from esper.config import Settings
from esper.embedded.stack import EmbeddedStack
from esper.errors import ConfigError, ConflictError, MissingBlobError, PositionError, UnavailableError
from esper.oona.producer import OonaProducer
from esper.schemas.events import CheckpointSaved, Event, KernelRegistered
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import BLUEPRINTS
from esper.storage.blob_inspection import stored_blobs
from esper.storage.blobs import BlobStore
from esper.storage.bucket_owner import KEY as OWNER
from esper.storage.garbage_collection import collect
from esper.storage.uploads import put
from esper.streams.blob_collection import planned_collection

pytestmark = pytest.mark.slow

SOON_S = 0.5


@pytest.fixture(scope="module")
def worker_stack() -> Any:
    """A stack for this module, whose log a worker projects."""
    from support.stacks import running_stack

    with ExitStack() as exits:
        stack = exits.enter_context(running_stack())
        yield stack


@pytest.fixture(scope="module")
def running_worker(worker_stack: EmbeddedStack, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The worker of that stack."""
    with running(worker(worker_stack, tmp_path_factory.mktemp("worker")), "worker.ready") as child:
        yield child


def registered(digest: str) -> KernelRegistered:
    kernel = KERNEL.model_copy(update={"kernel_sha256": digest, "blueprint_id": "noop"})
    return KernelRegistered(blueprint_id="noop", kernel=kernel)


async def send(stack: EmbeddedStack, *many: Event) -> None:
    async with OonaProducer(stack.settings().need_kafka()) as producer:
        await producer.send_batch([OonaMessage.of(e, id=uuid.uuid4(), source="test") for e in many])


async def send_garbage(stack: EmbeddedStack, value: bytes) -> None:
    async with AIOKafkaProducer(bootstrap_servers=stack.settings().need_kafka().bootstrap_servers) as producer:
        await producer.send_and_wait(BLUEPRINTS.name, value, key=b"noop")


def has_rows(stack: EmbeddedStack, table: str, count: int) -> Callable[[], bool]:
    async def query() -> bool:
        connection = await asyncpg.connect(stack.postgres.dsn)
        try:
            return bool(await connection.fetchval(f"SELECT count(*) >= {count} FROM esper.{table}"))
        finally:
            await connection.close()

    return lambda: asyncio.run(query())


def esper(stack: EmbeddedStack, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["storage", *arguments], env=stack.environment())


async def plan(settings: Settings, grace: timedelta = timedelta(days=7)) -> set[str]:
    async with (
        BlobStore(settings.need_s3()) as blobs,
        planned_collection(settings, blobs, grace, SOON_S) as planned,
    ):
        return {b.digest for b in planned.garbage}


def test_gc_refuses_empty_projections_and_short_grace(worker_stack: EmbeddedStack) -> None:
    asyncio.run(store_long_ago(worker_stack.s3, some_bytes()))
    with pytest.raises(PositionError, match="the projections are empty, no worker ever ran"):
        asyncio.run(plan(worker_stack.settings()))
    with pytest.raises(ConfigError, match="a grace period of 0:01:00 is too short"):
        asyncio.run(plan(worker_stack.settings(), timedelta(minutes=1)))


@pytest.mark.timeout(240)
def test_gc_keeps_referenced_blobs_and_deletes_the_rest(
    worker_stack: EmbeddedStack, running_worker: Any, tmp_path: Path
) -> None:
    kept, altered, unread, junk = (some_bytes() for _n in range(4))
    *digests, junk_digest = asyncio.run(store_long_ago(worker_stack.s3, kept, altered, unread, junk))
    kept_digest, altered_digest, unread_digest = digests
    missing_digest, young_digest = "f" * 64, asyncio.run(store_now(worker_stack, some_bytes()))
    saved = BY_TYPE["esper.checkpoint.saved.v1"]
    assert isinstance(saved, CheckpointSaved)
    asyncio.run(send_garbage(worker_stack, b'{"kernel": "' + unread_digest.encode() + b'", not JSON'))
    asyncio.run(send(worker_stack, saved, *(registered(d) for d in (kept_digest, altered_digest, missing_digest))))
    (folder_of(worker_stack.s3) / "kernels" / altered_digest).write_bytes(altered[:-1] + b"?")
    wait_until(has_rows(worker_stack, "kernels", 3), 60, "the kernels")
    wait_until(has_rows(worker_stack, "dead_letters", 1), 60, "the letter")
    wait_until(has_rows(worker_stack, "checkpoints", 1), 60, "the checkpoint")

    ran = esper(worker_stack, "verify", "--json")
    report = json.loads(ran.stdout)
    assert (ran.exit_code, report["is_whole"]) == (1, False)
    assert [f["digest"] for f in report["missing"]] == [missing_digest]
    assert [f["digest"] for f in report["altered"]] == [altered_digest]
    assert report["missing"][0]["referenced_by"] == ["kernels.kernel_sha256"]
    assert report["on_trainers_disks"] == [saved.sha256]
    assert {b["digest"] for b in report["unreferenced"]} >= {unread_digest, junk_digest, young_digest}
    shown = esper(worker_stack, "verify", "--sample", "0")
    assert shown.exit_code == 1, "every blob is looked up, though none is read"
    assert "missing: 1" in shown.stdout
    assert "altered" not in shown.stdout

    dry = json.loads(esper(worker_stack, "gc", "--json").stdout)
    assert junk_digest in {b["digest"] for b in dry["garbage"]}
    assert dry["deleted"] is None
    ran = esper(worker_stack, "gc", "--delete")
    assert ran.exit_code == 0, ran.output
    assert "deleted 2 blobs" in ran.stdout, "this one, and that of the test before"
    left = {d for _kind, d in asyncio.run(all_stored(worker_stack))}
    assert left == {kept_digest, altered_digest, unread_digest, young_digest}

    ran = esper(worker_stack, "get", kept_digest[:10], "-o", str(tmp_path / "kept"))
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "kept").read_bytes() == kept
    assert isinstance(esper(worker_stack, "get", "0" * 10).exception, MissingBlobError)
    assert len(json.loads(esper(worker_stack, "list", "--json").stdout)) == 4


async def store_now(stack: EmbeddedStack, *many: bytes) -> str:
    async with BlobStore(stack.settings().need_s3()) as blobs:
        return (await asyncio.gather(*map(blobs.put, many)))[0]


async def all_stored(stack: EmbeddedStack) -> Any:
    async with BlobStore(stack.settings().need_s3()) as blobs:
        return await stored_blobs(blobs)


@pytest.mark.timeout(240)
def test_gc_keeps_blobs_registered_while_it_runs(worker_stack: EmbeddedStack, running_worker: Any) -> None:
    many = [some_bytes() for _n in range(30)]
    digests = asyncio.run(store_long_ago(worker_stack.s3, *many))
    settings, is_planned = worker_stack.settings(), asyncio.Event()

    async def register(blobs: BlobStore, producer: OonaProducer) -> None:
        await is_planned.wait()  # so that the first collector has them all in its plan
        for data in many:
            digest = await blobs.put(data)
            await producer.send(OonaMessage.of(registered(digest), id=uuid.uuid4(), source="test"))

    async def collect_again_and_again(blobs: BlobStore, registering: asyncio.Task[None]) -> int:
        count = 0
        while not registering.done():
            async with planned_collection(settings, blobs, timeout_s=30) as planned:
                is_planned.set()
                count += len((await collect(blobs, planned.garbage, planned.older_than)).deleted)
        return count

    async def both() -> int:
        async with AsyncExitStack() as exits:
            producer = await exits.enter_async_context(OonaProducer(settings.need_kafka()))
            storing, collecting = [await exits.enter_async_context(BlobStore(settings.need_s3())) for _n in range(2)]
            registering = asyncio.create_task(register(storing, producer))
            count = await collect_again_and_again(collecting, registering)
            await registering
            return count

    num_deleted = asyncio.run(both())
    assert num_deleted, "collectors met the old ones before they were stored again"
    assert {d for _kind, d in asyncio.run(all_stored(worker_stack))} >= set(digests)


@pytest.mark.timeout(240)
def test_gc_refuses_while_references_are_unknown(worker_stack: EmbeddedStack, running_worker: Any) -> None:
    settings = worker_stack.settings()

    async def two_at_once() -> None:
        async with BlobStore(settings.need_s3()) as blobs, planned_collection(settings, blobs):
            await plan(settings)

    with pytest.raises(ConflictError, match="another `esper storage gc` is running"):
        asyncio.run(two_at_once())
    running_worker.stop()
    asyncio.run(send(worker_stack, registered("e" * 64)))
    with pytest.raises(UnavailableError, match=r"1 events behind the log \(innovation.blueprints\)"):
        asyncio.run(plan(settings))

    async def owned_by_another() -> None:
        async with BlobStore(settings.need_s3()) as blobs:
            async with blobs.client.operation("test") as operation:
                await put(operation, OWNER, b"another-cluster")
            await plan(settings)

    with pytest.raises(ConflictError, match="belongs to Kafka cluster another-cluster"):
        asyncio.run(owned_by_another())
