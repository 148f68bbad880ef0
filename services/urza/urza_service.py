"""Urza's process: what it holds open, and the two loops that keep the library complete.

One loop examines blueprints, one builds kernels; they share the sandbox, a job at a time in turn. Invariant: whatever
a blueprint or a service does, a loop tells it, waits and goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from esper.config import Settings
from esper.errors import ContractError
from esper.kasmina.catalogue import MAX_KERNEL_BYTES
from esper.logging import get_logger
from esper.oona.admin.topics import verify_topics
from esper.oona.broker_errors import TRANSIENT_ERRORS
from esper.oona.producer import OonaProducer
from esper.retry import Backoff
from esper.services.urza.certification.certifier import Certifier
from esper.services.urza.certification.sandbox import Sandbox
from esper.services.urza.certification.sandbox_jobs import Limits
from esper.services.urza.kernels.kernel_builder import KernelBuilder
from esper.services.urza.kernels.shipped_blueprints import is_shipped, ship
from esper.services.urza.metrics import UrzaMetrics
from esper.services.urza.settings import UrzaSettings
from esper.storage.blobs import BlobStore
from esper.streams.database.connection_types import Pool
from esper.streams.database.connections import connect_pool
from esper.streams.database.postgres_errors import DRIVER_ERRORS

RETRY_S = (0.2, 5.0)
TRANSIENT = (*TRANSIENT_ERRORS, ContractError, OSError, *DRIVER_ERRORS)
ANSWER_BYTES = MAX_KERNEL_BYTES + 1024 * 1024  # the largest that a job may say: one kernel and its header

_log = get_logger(__name__)

Step = Callable[[], Awaitable[bool]]
"""One look at what is to be done; whether all of it is."""


@dataclass(slots=True)
class Urza:
    """What the process holds open."""

    pool: Pool
    producer: OonaProducer
    blobs: BlobStore
    sandbox: Sandbox
    settings: UrzaSettings
    metrics: UrzaMetrics = field(init=False)
    standing: dict[str, bool] = field(default_factory=dict)
    """Loop -> whether its last look found everything done."""

    def __post_init__(self) -> None:
        self.metrics = UrzaMetrics(lambda: self.is_ready)

    @property
    def is_ready(self) -> bool:
        """Whether nothing that it needs is away, and catalogue and kernels were complete at the last look."""
        return bool(self.standing) and all(self.standing.values())


def sandbox_limits(settings: UrzaSettings) -> Limits:
    """What one job of the sandbox may use."""
    return Limits(
        wall_s=settings.sandbox_wall_s,
        cpu_s=settings.sandbox_cpu_s,
        memory_bytes=settings.sandbox_memory_mib * 1024 * 1024,
        answer_bytes=ANSWER_BYTES,
    )


@asynccontextmanager
async def open_urza(settings: Settings) -> AsyncIterator[Urza]:
    """Open everything, and keep catalogue and kernels complete while it is open.

    Raises:
        ConfigError, NotAllowedError, UnavailableError: with what to do.
    """
    own = settings.section("urza", UrzaSettings)
    kafka = settings.need_kafka()
    await verify_topics(kafka)
    async with AsyncExitStack() as exits:
        urza = Urza(
            sandbox=await exits.enter_async_context(Sandbox(sandbox_limits(own))),  # first: it warms up meanwhile
            pool=await exits.enter_async_context(connect_pool(settings.need_postgres())),
            producer=await exits.enter_async_context(OonaProducer(kafka, client_id="urza")),
            blobs=await exits.enter_async_context(BlobStore(settings.need_s3())),
            settings=own,
        )
        port = urza.metrics.serve(own.metrics_address)
        exits.callback(urza.metrics.stop)
        _log.info("urza.metrics_served", port=port)
        works = {name: _keep(urza, name, step) for name, step in _steps(urza).items()}
        works["beat"] = urza.metrics.health.keep_beating()
        beside = [asyncio.create_task(work, name=f"urza-{name}") for name, work in works.items()]
        try:
            yield urza
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


def _steps(urza: Urza) -> dict[str, Step]:
    certifier = Certifier(urza.pool, urza.producer, urza.sandbox, urza.settings)
    compiler = KernelBuilder(urza.pool, urza.producer, urza.blobs, urza.sandbox, urza.settings)
    has_proposed = has_shipped = False

    async def certify() -> bool:
        nonlocal has_proposed, has_shipped
        async with urza.pool.acquire() as connection:
            if not has_proposed:
                _log.info("catalogue.proposed", proposals=await ship(urza.producer, connection))
                has_proposed = True
            if not has_shipped and (has_shipped := await is_shipped(connection)):
                _log.info("catalogue.completed")
        await certifier.certify_pending()
        return has_shipped

    async def compile_kernels() -> bool:
        await compiler.build_wanted()
        return True

    return {"certifying": certify, "compiling": compile_kernels}


async def _keep(urza: Urza, name: str, step: Step) -> None:
    urza.standing[name], backoff = False, Backoff(*RETRY_S)
    while True:
        try:
            urza.standing[name] = await step()
            backoff.reset()
            await asyncio.sleep(urza.settings.poll_s)
            continue
        except TRANSIENT as error:
            _log.warning("urza.delayed", loop=name, error=str(error))
        except Exception:  # a fault of ours may not end the loop: it would stand still, and nobody would see it
            _log.exception("urza.failed", loop=name)
        urza.standing[name] = False
        await backoff.wait()
