"""Builds the kernels that runs could want: registered by an event once S3 has their bytes.

Built in the sandbox, in batches; while one batch is built, the one before goes to S3. What cannot be built is
recorded by an event too, and not tried again. Both events are caused by the change that certified the blueprint.
"""

import asyncio
import json
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
from esper.services.urza.certification.sandbox_jobs import BuildJob, BuiltKernel, WantedKernel, reason_of
from esper.services.urza.kernels.blob_upload import upload
from esper.services.urza.kernels.shipped_blueprints import SOURCE
from esper.services.urza.library_queries import Cause, cause_of
from esper.services.urza.settings import UrzaSettings
from esper.storage.blobs import BlobStore
from esper.streams.database.connection_types import Pool
from esper.streams.database.sql_queries import queries

MAX_WANTED = 1000  # of one look; the rest comes at the next
MAX_BATCH = 50  # kernels of one job
MAX_BATCH_BYTES = 64 * 1024 * 1024  # unless it is one kernel alone: what Urza holds in memory, twice

_log = get_logger(__name__)

KernelKey = tuple[str, str, int]


class KernelBuilder:
    """Builds each wanted kernel once. ``pool`` has the projections."""

    def __init__(self, pool: Pool, producer: Any, blobs: BlobStore, sandbox: Sandbox, settings: UrzaSettings) -> None:
        self._pool = pool
        self._producer = producer
        self._blobs = blobs
        self._sandbox = sandbox
        self._settings = settings
        self._done: set[KernelKey] = set()
        self._causes: dict[str, Cause] = {}

    async def build_wanted(self) -> int:
        """Build, store, read back and register what is wanted; gives the number of kernels.

        Raises:
            UnavailableError, NotAllowedError: Kafka, S3 or the sandbox is away; what was done stays done.
        """
        async with self._pool.acquire() as connection:
            rows = [r async for r in queries("library").wanted_kernels(connection, limit=MAX_WANTED)]
        wanted = [_wanted(r) for r in rows]
        self._causes = {r["blueprint_id"]: cause_of(r) for r in rows}
        self._done &= {_key(w) for w in wanted}  # the projection knows the others
        queue = deque(w for w in wanted if _key(w) not in self._done)
        count, storing = 0, None
        try:
            while queue:
                built = await self._build(queue)
                count += await storing if storing else 0
                storing = asyncio.create_task(self._store(built), name="urza-storing")
            count += await storing if storing else 0
        finally:
            if storing is not None and not storing.done():
                storing.cancel()
                await asyncio.gather(storing, return_exceptions=True)
        return count

    async def _build(self, queue: deque[WantedKernel]) -> list[tuple[WantedKernel, BuiltKernel]]:
        """Take a batch off the queue and build it; what a failure left unbuilt goes back, the culprit alone first."""
        batch = await self._next_batch(queue)
        if not batch:
            return []
        built, failure = await self._sandbox.build(BuildJob(kernels=tuple(batch), kernel_rng_seed=self._settings.kernel_rng_seed))
        left = batch[len(built) :]
        if failure is not None and len(batch) == 1:
            await self._refuse(left[0], failure)
            left = []
        elif failure is not None and not built:
            built, alone = await self._sandbox.build(BuildJob(kernels=(left[0],), kernel_rng_seed=self._settings.kernel_rng_seed))
            if alone is not None:
                await self._refuse(left[0], alone)
            left = left[1:]
        queue.extendleft(reversed(left))
        return list(zip(batch, built, strict=False))

    async def _next_batch(self, queue: deque[WantedKernel]) -> list[WantedKernel]:
        """The next kernels that fit one job; those that arithmetic refuses are recorded on the way."""
        batch, size = list[WantedKernel](), 0
        while queue and len(batch) < MAX_BATCH:
            wanted = queue[0]
            try:
                num_bytes = (
                    BYTES_PER_PARAMETER * cost_of(wanted.spec, wanted.target, wanted.num_features).num_parameters
                )
            except KernelError as error:
                await self._refuse(queue.popleft(), reason_of(error))
                continue
            if batch and size + num_bytes > MAX_BATCH_BYTES:
                break
            size += num_bytes
            batch.append(queue.popleft())
        return batch

    async def _store(self, built: Sequence[tuple[WantedKernel, BuiltKernel]]) -> int:
        for wanted, kernel in built:
            if kernel.header.refusal is not None:
                await self._refuse(wanted, kernel.header.refusal)
        whole = [(w, k) for w, k in built if k.header.refusal is None]
        found = await upload(self._blobs, [k.data for _w, k in whole], at_once=self._settings.parallel_uploads)
        there = [(w, k, digest) for (w, k), digest in zip(whole, found, strict=True) if isinstance(digest, str)]
        await self._producer.send_batch([self._registered(w, k, digest) for w, k, digest in there])
        self._done |= {_key(w) for w, _k, _digest in there}
        if there:
            _log.info("kernels.registered", count=len(there), bytes=sum(len(k.data) for _w, k, _d in there))
        for error in found:
            if isinstance(error, EsperError):
                raise error
        return len(there)

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

    def _registered(self, wanted: WantedKernel, built: BuiltKernel, digest: str) -> OonaMessage:
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


def _wanted(row: Any) -> WantedKernel:
    return WantedKernel(
        blueprint_id=row["blueprint_id"],
        blueprint_version=row["version"],
        spec=BlueprintSpec.model_validate(json.loads(row["spec"])),
        target=row["kind"],
        num_features=row["num_features"],
    )


def _key(wanted: WantedKernel) -> KernelKey:
    return wanted.blueprint_id, wanted.target, wanted.num_features
