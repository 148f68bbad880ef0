"""A run on the real stack: commands are applied once, crashes resume bit for bit, no step waits for the network."""

import asyncio
import hashlib
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conditions import wait_until, wait_until_async
from support.events.run_messages import read_run_messages
from support.events.seed_commands import SPEC, send_germinate, store_blob, store_kernel
from support.paths import PROCESSES
from support.processes.esper_processes import process
from support.processes.small_disk import end_of, on_small_disk
from torch import nn

import esper
from esper.connection.kernel_fetcher import KernelFetcher
from esper.connection.settings import LinkOptions
from esper.embedded.stack import EmbeddedStack
from esper.errors import ConflictError, ContractError, UnavailableError
from esper.kasmina.cache import KernelCache
from esper.kasmina.kernels import pack
from esper.schemas import events, ids, topics
from esper.schemas.enums import LayerKind, RejectionReason, SeedStage
from esper.storage.blobs import BlobStore

SCRIPT = PROCESSES / "resumable_run.py"


@pytest.mark.timeout(360)
async def test_killed_run_resumes_bit_for_bit(stack: EmbeddedStack, tmp_path: Path) -> None:
    kernel = await store_kernel(stack, 8)
    weights = {}
    for name, modes in {"whole": ["whole"], "broken": ["killed", "resumed"]}.items():
        run_id = f"{name}-{uuid.uuid4().hex[:8]}"
        command = ids.command_id(ids.decision_id(run_id, 1, 1))
        out = tmp_path / f"{name}.pt"
        for mode in modes:
            arguments = (str(SCRIPT), mode, run_id, str(tmp_path / "runs"), str(command), str(out))
            child = process(stack, tmp_path, f"{name}-{mode}", sys.executable, *arguments)
            child.start()
            if mode != "resumed":
                await asyncio.to_thread(wait_until, lambda c=child: "send" in c.log_path.read_text(), 90)
                await send_germinate(stack, run_id, kernel)
            await asyncio.to_thread(wait_until, lambda c=child: not c.is_alive, 120, "the end of the process")
            assert child.returncode == (-9 if mode == "killed" else 0), child.tail()
        weights[name] = torch.load(out, weights_only=True)
        if name == "broken":
            await check_story_of_a_resumed_run(stack, run_id, command)
    assert weights["whole"].keys() == weights["broken"].keys()
    for name, weight in weights["whole"].items():
        assert torch.equal(weight, weights["broken"][name]), name


async def check_story_of_a_resumed_run(stack: EmbeddedStack, run_id: str, command: uuid.UUID) -> None:
    lifecycle = [m.data for m in await read_run_messages(stack, run_id, topics.LIFECYCLE)]
    germinated = [e for e in lifecycle if isinstance(e, events.SeedTransitioned) and e.command_id == command]
    assert [(e.incarnation, e.step) for e in germinated] == [(1, 30), (2, 30)]
    resumed = [
        m.data for m in await read_run_messages(stack, run_id, topics.RUNS) if isinstance(m.data, events.RunResumed)
    ]
    assert [(e.incarnation, e.step, e.from_incarnation) for e in resumed] == [(2, 20, 1)]
    ends = [m.data for m in await read_run_messages(stack, run_id, topics.FIELD_REPORTS) if m.data.incarnation == 2]
    assert [e.outcome for e in ends] == [SeedStage.CULLED]
    assert (ends[0].before, ends[0].command_id) == (0.2, command)


def training(stack: EmbeddedStack, folder: Path, run_id: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), seeds_per_layer=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    link = LinkOptions.model_validate({"boundary_steps": 5, "health_interval_steps": 1, "folder": folder, **options})
    run = esper.connect(model, optimizer, run_id=run_id, settings=stack.settings(), options=link)

    def one_step() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 6)).sum().backward()
        optimizer.step()
        run.step()

    return run, one_step


async def test_invalid_commands_are_rejected_by_an_event(stack: EmbeddedStack, tmp_path: Path, run_id: str) -> None:
    kernel, narrow = await store_kernel(stack, 8), await store_kernel(stack, 3)
    run, one_step = training(stack, tmp_path, run_id)

    def train() -> None:
        with run:
            for _n in range(7):
                one_step()
            sent = [
                asyncio.run(send_germinate(stack, run_id, kernel, boundary=1)),
                asyncio.run(send_germinate(stack, run_id, kernel, boundary=2)),
                asyncio.run(send_germinate(stack, run_id, kernel, boundary=3, incarnation=7, seed_id=1)),
                asyncio.run(send_germinate(stack, run_id, kernel, boundary=4, expires_at_step=6, seed_id=1)),
                asyncio.run(send_germinate(stack, run_id, kernel, boundary=5, layer_id="nowhere")),
                asyncio.run(send_germinate(stack, run_id, narrow, boundary=6, seed_id=1)),
                asyncio.run(send_germinate(stack, run_id, ("0" * 64, 9), boundary=7, seed_id=1)),
                asyncio.run(send_germinate(stack, run_id, kernel, boundary=1)),
            ]
            wait_until(lambda: run._inbox.has_seen([m.id for m in sent]), 30, "all commands")
            for _n in range(10):
                one_step()

    await asyncio.to_thread(train)
    lifecycle = await read_run_messages(stack, run_id, topics.LIFECYCLE)
    applied = [m for m in lifecycle if isinstance(m.data, events.SeedTransitioned) and m.data.command_id]
    assert len(applied) == 1
    assert applied[0].causation_id == applied[0].data.command_id
    rejected = [m.data.reason for m in lifecycle if isinstance(m.data, events.CommandRejected)]
    assert rejected == [
        RejectionReason.UNEXPECTED_STAGE,
        RejectionReason.STALE_INCARNATION,
        RejectionReason.EXPIRED,
        RejectionReason.UNKNOWN_SEED,
        RejectionReason.KERNEL_INVALID,
        RejectionReason.KERNEL_UNAVAILABLE,
    ]


async def test_broken_kernel_is_rejected_and_changes_nothing(stack: EmbeddedStack, tmp_path: Path, run_id: str) -> None:
    zeros = {"0.weight": torch.zeros(2, 8), "1.weight": torch.zeros(8, 2)}
    made = {
        "is malformed": b"no kernel at all",
        "does not fit its spec": pack("x", SPEC, LayerKind.LINEAR, 9, zeros),
        "not finite": pack("x", SPEC, LayerKind.LINEAR, 8, {**zeros, "0.weight": torch.full((2, 8), float("nan"))}),
        "must be all zero": pack("x", SPEC, LayerKind.LINEAR, 8, {**zeros, "1.weight": torch.ones(8, 2)}),
        "it was altered": pack(f"x-{uuid.uuid4().hex}", SPEC, LayerKind.LINEAR, 8, zeros),
    }
    kernels = [await store_blob(stack, data) for data in made.values()]
    altered = stack.s3.root / "data" / "esper" / "kernels" / kernels[-1][0]
    altered.write_bytes(altered.read_bytes()[:-1] + b"?")
    run, one_step = training(stack, tmp_path, run_id)

    def train() -> None:
        with run:
            one_step()
            sent = [asyncio.run(send_germinate(stack, run_id, k, boundary=n)) for n, k in enumerate(kernels, start=1)]
            wait_until(lambda: run._inbox.has_seen([m.id for m in sent]), 30, "all commands")
            for _n in range(10):
                one_step()

    await asyncio.to_thread(train)
    recorded = [m.data for m in await read_run_messages(stack, run_id, topics.LIFECYCLE)]
    assert [type(e) for e in recorded] == [events.CommandRejected] * len(made)
    for event, says in zip(recorded, made, strict=True):
        assert event.reason is RejectionReason.KERNEL_INVALID
        assert says in event.detail
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.manual_seed(0)
    for layer in (plain[0], plain[2]):
        layer.reset_parameters()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for _n in range(11):
        optimizer.zero_grad()
        plain(torch.ones(4, 6)).sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), run._model.parameters(), strict=True))


@pytest.mark.timeout(180)
@pytest.mark.slow
async def test_steps_continue_without_a_broker_and_lose_nothing(
    fresh_stack: EmbeddedStack, tmp_path: Path, run_id: str
) -> None:
    import time

    run, one_step = training(fresh_stack, tmp_path, run_id, flush_timeout_s=60)

    def train() -> float:
        slowest = 0.0
        with run:
            fresh_stack.kafka.stop()
            gone_until = time.monotonic() + 20.0
            while time.monotonic() < gone_until:
                began = time.monotonic()
                one_step()
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.02)
            fresh_stack.kafka.start()
            for _n in range(20):
                one_step()
        return slowest

    slowest = await asyncio.to_thread(train)
    assert slowest < 2.0, "a step waited for the network"
    sequences = sorted({m.data.sequence for m in await read_run_messages(fresh_stack, run_id)})
    assert len(sequences) > 1000
    assert sequences == list(range(len(sequences)))


@pytest.mark.timeout(150)
async def test_training_continues_on_a_full_disk_without_growth(
    stack: EmbeddedStack, tmp_path: Path, run_id: str
) -> None:
    kernel = await store_kernel(stack, 8)
    child = on_small_disk(stack, tmp_path, "training", run_id, str(tmp_path))
    child.start()

    async def says(words: str) -> None:
        def is_said() -> bool:
            assert child.is_alive, child.tail(40)
            return words in child.log_path.read_text()

        await asyncio.to_thread(wait_until, is_said, 60, words)

    try:
        await says("send a command")
        command = await send_germinate(stack, run_id, kernel)
        (tmp_path / "sent").touch()
        await says("stop the broker")
        stack.kafka.pause()
        (tmp_path / "stopped").touch()
        await says("start the broker")
    finally:
        stack.kafka.resume()
        (tmp_path / "started").touch()
    await asyncio.to_thread(end_of, child)
    found = [m.data for m in await read_run_messages(stack, run_id, topics.RUNS, topics.LIFECYCLE)]
    assert [e.boundary for e in found if isinstance(e, events.BoundaryReached)] == [5], (
        "recorded again once the disk has space"
    )
    grown = [(e.step, e.command_id) for e in found if isinstance(e, events.SeedTransitioned) and e.command_id]
    assert grown == [(25, command.id)]
    sequences = sorted({m.data.sequence for m in await read_run_messages(stack, run_id)})
    assert sequences == list(range(len(sequences))), "an event that was not written uses no number"


async def test_dropped_telemetry_is_recorded_before_the_run_ends(
    stack: EmbeddedStack, tmp_path: Path, run_id: str
) -> None:
    run, one_step = training(stack, tmp_path, run_id, max_queued_telemetry=2, boundary_steps=1000)

    def train() -> None:
        with run:
            for _n in range(60):
                one_step()

    await asyncio.to_thread(train)
    found = [m.data for m in await read_run_messages(stack, run_id)]
    measured = [e for e in found if isinstance(e, events.LayerHealthMeasured)]
    (gap,) = [e for e in found if isinstance(e, events.TelemetryGap)]
    assert len(measured) + gap.num_lost == 60 * len(run._model.layers), "to the record"
    sequences = sorted(e.sequence for e in found)
    assert sequences == list(range(len(found)))
    assert [type(e) for e in sorted(found, key=lambda e: e.sequence)[-2:]] == [events.TelemetryGap, events.RunEnded]


async def test_run_belongs_to_one_process(stack: EmbeddedStack, tmp_path: Path, run_id: str) -> None:
    run, _step = training(stack, tmp_path, run_id)
    again, _step = training(stack, tmp_path, run_id)

    def both() -> None:
        with run, pytest.raises(ConflictError, match="holds a run already"), again:
            pass

    await asyncio.to_thread(both)


def test_missing_broker_at_the_start_is_one_clear_error(stack: EmbeddedStack, tmp_path: Path, run_id: str) -> None:
    run, _step = training(stack, tmp_path, run_id)
    run._link._settings = stack.settings().model_copy(
        update={"kafka": stack.settings().need_kafka().model_copy(update={"bootstrap_servers": "127.0.0.1:1"})}
    )
    with pytest.raises(UnavailableError, match="no Kafka broker answers"), run:
        pass


async def test_forked_worker_has_no_effect(stack: EmbeddedStack, tmp_path: Path, run_id: str) -> None:
    import os

    run, one_step = training(stack, tmp_path, run_id)

    def train() -> int:
        with run:
            one_step()
            child = os.fork()
            if child == 0:
                run.step()
                os._exit(0 if run.step_number == 1 else 1)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert await asyncio.to_thread(train) == 0


async def test_blobs_match_their_digest(stack: EmbeddedStack) -> None:
    data = uuid.uuid4().bytes * 100
    async with BlobStore(stack.settings().need_s3()) as blobs:
        digest = await blobs.put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert await blobs.get(digest, max_bytes=10_000) == data
        with pytest.raises(ContractError, match="over 10"):
            await blobs.get(digest, max_bytes=10)
        assert not await blobs.exists("0" * 64)
        altered = stack.s3.root / "data" / "esper" / "kernels" / digest
        altered.write_bytes(data[:-1] + b"?")
        with pytest.raises(ContractError, match="it was altered"):
            await blobs.get(digest, max_bytes=10_000)


async def test_fetcher_fetches_a_kernel_once_for_many_commands(
    stack: EmbeddedStack, tmp_path: Path, run_id: str
) -> None:
    kernels = [await store_kernel(stack, width) for width in (8, 16, 32)]
    commands = [
        events.GerminateSeed.model_validate({
            "run_id": run_id, "incarnation": 1, "boundary": 1, "decision_id": uuid.uuid4(), "layer_id": "0",
            "seed_id": 0, "expires_at_step": 9, "blueprint_id": "low-rank-2", "blueprint_version": 3,
            "kernel_sha256": digest, "kernel_size_bytes": size,
        })
        for digest, size in kernels
    ]  # fmt: skip
    cache, access_history = KernelCache(), tmp_path / "access_history.json"
    async with BlobStore(stack.settings().need_s3()) as blobs, KernelFetcher(cache, blobs, access_history) as fetcher:
        waiters = [asyncio.create_task(fetcher.fetch_for(commands[0])) for _n in range(32)]
        await asyncio.sleep(0)
        waiters[0].cancel()  # the one that fetches
        answers = await asyncio.gather(*waiters[1:])
        assert {kernel.kernel_sha256 for kernel, _problem in answers} == {kernels[0][0]}
        assert cache.stats.fetches == 2, "the cancelled one, and one for all others"
        for command in (*commands[1:], *commands):
            assert (await fetcher.fetch_for(command))[1] is None
    later = KernelCache()
    async with BlobStore(stack.settings().need_s3()) as blobs, KernelFetcher(later, blobs, access_history) as fetcher:
        early = asyncio.create_task(fetcher.keep_prefetching())
        await wait_until_async(lambda: _is(later.stats.prefetched == 3))
        for command in commands:
            assert (await fetcher.fetch_for(command))[1] is None
        early.cancel()
        await asyncio.gather(early, return_exceptions=True)
    assert (later.stats.fetches, later.stats.misses, later.stats.prefetched_used) == (0, 0, 3)


async def _is(value: bool) -> bool:
    return value


async def test_kernel_of_an_active_seed_is_pinned_and_prefetched(
    stack: EmbeddedStack, tmp_path: Path, run_id: str
) -> None:
    kernel = await store_kernel(stack, 8)

    def train(name: str) -> KernelCache:
        run, one_step = training(stack, tmp_path, name)
        cache = run._model.kernel_cache
        with run:
            if name != run_id:
                wait_until(lambda: cache.stats.prefetched, 30, "the kernel of the run before")
            sent = [asyncio.run(send_germinate(stack, name, kernel, boundary=n + 1, seed_id=n)) for n in range(2)]
            wait_until(lambda: run._inbox.has_seen([m.id for m in sent]), 30, "the commands")
            for _n in range(5):
                one_step()
            assert cache.stats.pinned_bytes == cache.stats.bytes > 0
        assert cache.stats.pinned_bytes == 0, "the run is over"
        return cache

    assert (await asyncio.to_thread(train, run_id)).stats.fetches == 1
    assert (await asyncio.to_thread(train, f"{run_id}-again")).stats.fetches == 0
