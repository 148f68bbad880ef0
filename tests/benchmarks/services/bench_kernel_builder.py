"""How fast Urza certifies blueprints and builds kernels, against the same work one by one.

1. Start: `esper serve urza` on an empty log, until all shipped blueprints are certified.
2. Examinations per second in a warm sandbox, and in a new sandbox for each blueprint.
3. Kernels per second: Urza's kernel builder, and each kernel built, stored, read back and registered before the next;
   with a local S3, and with one that is ``--away`` milliseconds away (a delay before each call). In turns, with the same
   blueprints at different widths.

Broker, Postgres, S3, worker and Urza share one machine: compare the ratios.
"""

import argparse
import asyncio
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.conditions import wait_until_async
from support.processes.esper_processes import SCRIPTS, log_of, process, running, worker
from support.stacks import running_stack

from esper.config import S3Settings
from esper.embedded.stack import EmbeddedStack
from esper.kasmina.catalogue import MAX_KERNEL_BYTES
from esper.kasmina.kernels import build_kernel, load_kernel
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.assets import BlueprintSpec, Kernel, LayerNode
from esper.schemas.enums import LayerKind
from esper.schemas.messages import OonaMessage
from esper.services.urza.certification.sandbox import Sandbox
from esper.services.urza.certification.sandbox_messages import ExamineJob
from esper.services.urza.kernels.examined_kernels import ExaminedKernels
from esper.services.urza.kernels.kernel_builder import KernelBuilder
from esper.services.urza.kernels.shipped_blueprints import SHIPPED
from esper.services.urza.library_queries import wanted_kernels
from esper.services.urza.projection_reader import ProjectionReader
from esper.services.urza.settings import UrzaSettings
from esper.services.urza.urza_service import sandbox_limits
from esper.storage.blobs import BlobStore
from esper.storage.s3_client import S3Client
from esper.streams.database.connections import connect_pool

DEADLINE_S = 120.0
OWN = UrzaSettings()


class DistantClient(S3Client):
    """A client of a distant S3: every request is delayed."""

    wait_s = 0.0

    async def send(self, method: str, options: dict[str, Any]) -> Any:
        await asyncio.sleep(self.wait_s)
        return await super().send(method, options)


class DistantStore(BlobStore):
    """A blob store in a distant S3."""

    def __init__(self, s3: S3Settings) -> None:
        super().__init__(s3)
        self.client = self.line = DistantClient(s3)


class Parts:
    """Objects that both variants use."""

    def __init__(self, reader: ProjectionReader, producer: OonaProducer, blobs: DistantStore, sandbox: Sandbox) -> None:
        self.reader, self.producer, self.blobs, self.sandbox = reader, producer, blobs, sandbox

    async def wanted(self) -> list[Any]:
        """The kernels that are requested now."""
        return await wanted_kernels(self.reader, limit=5000)

    async def until_wanted(self, condition: Callable[[int], bool]) -> list[Any]:
        """Wait until that many kernels are requested."""
        rows: list[Any] = []

        async def is_it() -> bool:
            rows[:] = await self.wanted()
            return condition(len(rows))

        await wait_until_async(is_it, DEADLINE_S, "the wanted kernels")
        return rows

    async def start_run(self, widths: Sequence[int]) -> None:
        """Start a run with a linear layer of each width."""
        run_id = f"bench-{uuid.uuid4().hex[:8]}"
        layers = tuple(
            LayerNode(layer_id=f"fc{n}", kind="linear", num_features=n, num_parameters=n, num_seeds=1) for n in widths
        )
        event = events.RunStarted(
            run_id=run_id, incarnation=1, sequence=0, step=0, model="N", layers=layers, edges=(), boundary_steps=5,
            command_offset=0,
        )  # fmt: skip
        await self.producer.send(OonaMessage.of(event, id=ids.trainer_event_id(run_id, 1, 0), source="bench"))


async def one_by_one(parts: Parts, rows: Sequence[Any]) -> int:
    """Build each kernel with all its round trips before the next."""
    for row in rows:
        spec = BlueprintSpec.model_validate(row["spec"])
        kind, width = LayerKind(row["kind"]), row["num_features"]
        data = build_kernel(row["blueprint_id"], spec, kind, width, seed=OWN.kernel_rng_seed)
        digest = await parts.blobs.put(data)
        loaded = load_kernel(await parts.blobs.get(digest, max_bytes=MAX_KERNEL_BYTES), digest)
        kernel = Kernel(
            kernel_sha256=digest, blueprint_id=row["blueprint_id"], blueprint_version=row["version"], target=kind,
            num_features=width, num_parameters=loaded.num_parameters, size_bytes=len(data),
        )  # fmt: skip
        event = events.KernelRegistered(blueprint_id=row["blueprint_id"], kernel=kernel)
        await parts.producer.send(OonaMessage.of(event, id=ids.kernel_event_id(digest), source="bench"))
    return len(rows)


async def bench_kernels(parts: Parts, num_widths: int, rounds: int, away_s: Sequence[float]) -> None:
    """Measure both variants in turns."""
    first = 8
    for wait_s in away_s:
        taken = {"one by one": 0.0, "Urza": 0.0}
        count = {"one by one": 0, "Urza": 0}
        for _round in range(rounds):
            for name in taken:
                await parts.start_run(range(first, first + num_widths))
                first += num_widths
                rows = await parts.until_wanted(lambda n: n >= num_widths)
                parts.blobs.line.wait_s, begin = wait_s, time.monotonic()
                if name == "Urza":
                    builder = KernelBuilder(
                        parts.reader, parts.producer, parts.blobs, parts.sandbox, OWN, ExaminedKernels()
                    )
                    count[name] += await builder.build_wanted()
                else:
                    count[name] += await one_by_one(parts, rows)
                taken[name] += time.monotonic() - begin
                parts.blobs.line.wait_s = 0.0
                await parts.until_wanted(lambda n: n == 0)
        rates = {name: count[name] / taken[name] for name in taken}
        for name, rate in rates.items():
            print(f"S3 {1000 * wait_s:>3.0f} ms away, {name:<10} {count[name]:>5} kernels: {rate:>7,.0f} kernels/s")
        print(f"S3 {1000 * wait_s:>3.0f} ms away: {rates['Urza'] / rates['one by one']:.1f} times as fast", flush=True)


async def bench_examinations(rounds: int, cold: int) -> None:
    """Measure examinations of the shipped blueprints in one sandbox, and of a few in new sandboxes."""
    jobs = [
        ExamineJob(blueprint_id=i, spec=s, widths=OWN.certify_widths, kernel_rng_seed=0) for i, s in SHIPPED.items()
    ]
    async with Sandbox(sandbox_limits(OWN)) as sandbox:
        begin = time.monotonic()
        await sandbox.examine(jobs[0])
        start_s, begin = time.monotonic() - begin, time.monotonic()
        for _round in range(rounds):
            for job in jobs:
                assert (await sandbox.examine(job)).check_error is None
        warm_s = (time.monotonic() - begin) / rounds / len(jobs)
    begin = time.monotonic()
    for job in jobs[:cold]:
        async with Sandbox(sandbox_limits(OWN)) as sandbox:
            await sandbox.examine(job)
    cold_s = (time.monotonic() - begin) / cold
    print(f"examinations: first {start_s:.1f} s after the start, then {1000 * warm_s:.0f} ms per blueprint")
    print(f"examination in a new sandbox: {cold_s:.1f} s, {cold_s / warm_s:.0f} times as long", flush=True)


async def bench_start(stack: EmbeddedStack, folder: Path) -> None:
    """Measure the start of Urza on an empty log, until all shipped blueprints are certified."""
    child = process(stack, folder, "urza", str(SCRIPTS / "esper"), "serve", "urza")
    begin = time.monotonic()
    with running(child, "urza.ready"):

        async def is_complete() -> bool:
            return "catalogue.completed" in log_of(child)

        ready_s = time.monotonic() - begin
        await wait_until_async(is_complete, DEADLINE_S, "the catalogue")
        complete_s = time.monotonic() - begin
    durations = f"ready after {ready_s:.1f} s, all {len(SHIPPED)} shipped blueprints certified after {complete_s:.1f} s"
    print(f"esper serve urza, from an empty log: {durations}", flush=True)


async def bench(stack: EmbeddedStack, folder: Path, arguments: argparse.Namespace) -> None:
    settings = stack.settings()
    await bench_start(stack, folder)
    await bench_examinations(arguments.rounds, arguments.cold)
    async with AsyncExitStack() as exits:
        sandbox = await exits.enter_async_context(Sandbox(sandbox_limits(OWN)))
        pool = await exits.enter_async_context(connect_pool(settings.need_postgres()))
        producer = await exits.enter_async_context(OonaProducer(settings.need_kafka(), client_id="bench"))
        blobs = await exits.enter_async_context(DistantStore(settings.need_s3()))
        await sandbox.examine(
            ExamineJob(blueprint_id="warm", spec=SHIPPED["affine"], widths=(8,), kernel_rng_seed=0)
        )  # the start of the sandbox is not measured
        parts = Parts(ProjectionReader(pool, settings.need_postgres()), producer, blobs, sandbox)
        await bench_kernels(parts, arguments.widths, arguments.rounds, [0.0, arguments.away / 1000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--widths", type=int, default=40, help="kernels per turn; seven shipped blueprints fit linear layers"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cold", type=int, default=3, help="blueprints to examine in new sandboxes")
    parser.add_argument("--away", type=float, default=10.0, help="delay of the distant S3 in milliseconds")
    arguments = parser.parse_args()
    with running_stack() as stack, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running(worker(stack, folder), "worker.ready"):
            asyncio.run(bench(stack, folder, arguments))


if __name__ == "__main__":
    main()
