"""Builds the kernels that runs can request, stores them in S3 and registers each with an event.

Kernels are built in the sandbox, in batches; while one batch is built, the one before goes to S3. Those that an
examination built already are taken from there. A kernel that cannot be built is refused with an event, and not tried
again. Both events are caused by the change that certified the blueprint. Invariant: an event names a kernel only
once S3 has its bytes: S3 verifies their checksum on upload, and ``BlobStore`` their size.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from esper.errors import EsperError, KernelError
from esper.kasmina.catalogue import BYTES_PER_PARAMETER, cost_of
from esper.logging import get_logger
from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec, Kernel
from esper.schemas.events import KernelRefused, KernelRegistered
from esper.schemas.messages import OonaMessage
from esper.services.urza.certification.sandbox import Sandbox
from esper.services.urza.certification.sandbox_messages import BuildJob, BuiltKernel, WantedKernel, reason_of
from esper.services.urza.kernels.examined_kernels import ExaminedKernels
from esper.services.urza.kernels.shipped_blueprints import SOURCE
from esper.services.urza.library_queries import Cause, cause_of, wanted_kernels
from esper.services.urza.projection_reader import ProjectionReader, Row
from esper.services.urza.settings import UrzaSettings
from esper.storage.blobs import BlobStore

MAX_WANTED = 1000  # of one query; later ones return the rest
MAX_BATCH = 50  # kernels of one job
MAX_BATCH_BYTES = 64 * 1024 * 1024  # unless it is one kernel; Urza holds twice as much in memory

_log = get_logger(__name__)

KernelKey = tuple[str, str, int]
Built = tuple[WantedKernel, BuiltKernel]


class KernelBuilder:
    """Builds each wanted kernel once."""

    def __init__(
        self,
        reader: ProjectionReader,
        producer: Any,
        blobs: BlobStore,
        sandbox: Sandbox,
        settings: UrzaSettings,
        examined: ExaminedKernels,
    ) -> None:
        self._reader = reader
        self._producer = producer
        self._blobs = blobs
        self._sandbox = sandbox
        self._settings = settings
        self._examined = examined
        self._done: set[KernelKey] = set()
        self._causes: dict[str, Cause] = {}

    async def build_wanted(self) -> int:
        """Build, store and register the wanted kernels. Returns the number of kernels registered.

        Raises:
            UnavailableError, NotAllowedError: Kafka, S3 or the sandbox is away; finished kernels stay registered.
        """
        rows = await wanted_kernels(self._reader, limit=MAX_WANTED)
        wanted = [_wanted_kernel(r) for r in rows]
        self._causes = {r["blueprint_id"]: cause_of(r) for r in rows}
        self._done &= {_key(w) for w in wanted}  # the projection has the others
        queue = deque(w for w in wanted if _key(w) not in self._done)
        num_registered = await self._store(self._take_examined(queue))
        storing = None
        try:
            while queue:
                built = await self._build_batch(queue)
                num_registered += await storing if storing else 0
                storing = asyncio.create_task(self._store(built), name="urza-store-kernels")
            num_registered += await storing if storing else 0
        finally:
            if storing is not None and not storing.done():
                storing.cancel()
                await asyncio.gather(storing, return_exceptions=True)
        return num_registered

    def _take_examined(self, queue: deque[WantedKernel]) -> list[Built]:
        """Remove the kernels that an examination built from the queue."""
        wanted, examined = list(queue), list[Built]()
        queue.clear()
        for one in wanted:
            kernel = self._examined.take(one)
            if kernel is None:
                queue.append(one)
            else:
                examined.append((one, kernel))
        return examined

    async def _build_batch(self, queue: deque[WantedKernel]) -> list[Built]:
        """Build the next batch. Unbuilt kernels return to the queue; one that fails alone is refused."""
        batch = await self._next_batch(queue)
        if not batch:
            return []
        built, failure = await self._build(batch)
        if failure is not None and not built and len(batch) > 1:  # any kernel of the batch can have lost its output
            built, failure = await self._build(batch[:1])
        left = batch[len(built) :]
        if failure is not None and not built:
            await self._refuse(left.pop(0), failure)
        queue.extendleft(reversed(left))
        return list(zip(batch, built, strict=False))

    async def _build(self, kernels: Sequence[WantedKernel]) -> tuple[list[BuiltKernel], str | None]:
        job = BuildJob(kernels=tuple(kernels), kernel_rng_seed=self._settings.kernel_rng_seed)
        return await self._sandbox.build(job)

    async def _next_batch(self, queue: deque[WantedKernel]) -> list[WantedKernel]:
        """The next kernels that fit into one job; those that the catalogue refuses are refused on the way."""
        batch, size = list[WantedKernel](), 0
        while queue and len(batch) < MAX_BATCH:
            wanted = queue[0]
            try:
                num_parameters = cost_of(wanted.spec, wanted.target, wanted.num_features).num_parameters
            except KernelError as error:
                await self._refuse(queue.popleft(), reason_of(error))
                continue
            num_bytes = BYTES_PER_PARAMETER * num_parameters
            if batch and size + num_bytes > MAX_BATCH_BYTES:
                break
            size += num_bytes
            batch.append(queue.popleft())
        return batch

    async def _store(self, kernels: Sequence[Built]) -> int:
        """Upload and register kernels, refuse the unbuilt ones. One that fails does not keep the others back.

        Raises:
            UnavailableError, NotAllowedError: S3 or Kafka; the first error, after the others are registered.
        """
        for wanted, kernel in kernels:
            if kernel.header.refusal is not None:
                await self._refuse(wanted, kernel.header.refusal)
        whole = [(w, k) for w, k in kernels if k.header.refusal is None]
        results = await asyncio.gather(*(self._upload(k.data) for _w, k in whole))
        stored = [(w, k, found) for (w, k), found in zip(whole, results, strict=True) if isinstance(found, str)]
        await self._producer.send_batch([self._registration(w, k, digest) for w, k, digest in stored])
        self._done |= {_key(w) for w, _k, _digest in stored}
        if stored:
            _log.info("kernels.registered", count=len(stored), bytes=sum(len(k.data) for _w, k, _d in stored))
        for found in results:
            if isinstance(found, EsperError):
                raise found
        return len(stored)

    async def _upload(self, data: bytes) -> str | EsperError:
        try:
            return await self._blobs.put(data)
        except EsperError as error:
            return error

    async def _refuse(self, wanted: WantedKernel, reason: str) -> None:
        event = KernelRefused(
            blueprint_id=wanted.blueprint_id,
            blueprint_version=wanted.blueprint_version,
            target=wanted.target,
            num_features=wanted.num_features,
            reason=reason,
        )
        where = (wanted.blueprint_id, wanted.blueprint_version, wanted.target, wanted.num_features)
        await self._producer.send(self._message(event, ids.kernel_refusal_id(*where)))
        self._done.add(_key(wanted))
        _log.warning("kernel.refused", blueprint=where[0], kind=wanted.target, width=wanted.num_features, reason=reason)

    def _registration(self, wanted: WantedKernel, built: BuiltKernel, digest: str) -> OonaMessage:
        kernel = Kernel(
            kernel_sha256=digest,
            blueprint_id=wanted.blueprint_id,
            blueprint_version=wanted.blueprint_version,
            target=wanted.target,
            num_features=wanted.num_features,
            num_parameters=built.header.num_parameters,
            size_bytes=len(built.data),
        )
        event = KernelRegistered(blueprint_id=wanted.blueprint_id, kernel=kernel)
        return self._message(event, ids.kernel_event_id(digest))

    def _message(self, event: KernelRegistered | KernelRefused, event_id: UUID) -> OonaMessage:
        cause = self._causes[event.blueprint_id]
        return OonaMessage.of(event, id=event_id, source=SOURCE, causation_id=cause.id, traceparent=cause.traceparent)


def _wanted_kernel(row: Row) -> WantedKernel:
    return WantedKernel(
        blueprint_id=row["blueprint_id"],
        blueprint_version=row["version"],
        spec=BlueprintSpec.model_validate(row["spec"]),
        target=row["kind"],
        num_features=row["num_features"],
    )


def _key(wanted: WantedKernel) -> KernelKey:
    return wanted.blueprint_id, wanted.target, wanted.num_features
