"""Urza's process: its open resources, and the two loops that keep the library complete.

One loop examines blueprints, the other builds kernels; they take turns in the sandbox, one job at a time. Invariant:
no blueprint and no failing dependency ends a loop: it logs the error, waits and tries again.
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
from esper.services.urza.blueprint_changes import BlueprintChanges
from esper.services.urza.certification.certifier import Certifier
from esper.services.urza.certification.sandbox import Sandbox
from esper.services.urza.certification.sandbox_messages import Limits
from esper.services.urza.kernels.examined_kernels import ExaminedKernels
from esper.services.urza.kernels.kernel_builder import KernelBuilder
from esper.services.urza.kernels.shipped_blueprints import are_shipped_validated, propose_shipped
from esper.services.urza.metrics import UrzaMetrics
from esper.services.urza.projection_reader import ProjectionReader
from esper.services.urza.settings import UrzaSettings
from esper.storage.blobs import BlobStore
from esper.streams.database.connections import connect_pool

RETRY_S = (0.2, 5.0)  # bounds of the first wait and of every wait
TRANSIENT = (*TRANSIENT_ERRORS, ContractError, OSError)
MAX_OUTPUT_BYTES = MAX_KERNEL_BYTES + 1024 * 1024  # of one job: the largest kernel and its header

_log = get_logger(__name__)

Step = Callable[[], Awaitable[bool]]
"""One pass of a loop; returns whether nothing is left to do."""


@dataclass(slots=True)
class Urza:
    """The resources that the process holds open."""

    reader: ProjectionReader
    producer: OonaProducer
    blobs: BlobStore
    sandbox: Sandbox
    settings: UrzaSettings
    changes: BlueprintChanges = field(init=False)
    metrics: UrzaMetrics = field(init=False)
    loops_complete: dict[str, bool] = field(default_factory=dict)
    """Loop -> whether its last pass left nothing to do."""

    def __post_init__(self) -> None:
        self.changes = BlueprintChanges(self.reader, self.producer)
        self.metrics = UrzaMetrics(lambda: self.is_ready)

    @property
    def is_ready(self) -> bool:
        """Whether all dependencies answered, and catalogue and kernels were complete, at the last pass of each loop."""
        return bool(self.loops_complete) and all(self.loops_complete.values())


def sandbox_limits(settings: UrzaSettings) -> Limits:
    """The limits of one sandbox job."""
    return Limits(
        wall_s=settings.sandbox_wall_s,
        cpu_s=settings.sandbox_cpu_s,
        memory_bytes=settings.sandbox_memory_mib * 1024 * 1024,
        output_bytes=MAX_OUTPUT_BYTES,
    )


@asynccontextmanager
async def open_urza(settings: Settings) -> AsyncIterator[Urza]:
    """Open all resources, and keep catalogue and kernels complete while they are open.

    Raises:
        ConfigError, NotAllowedError, UnavailableError: a dependency is misconfigured, refuses Urza, or is away.
    """
    urza_settings = settings.section("urza", UrzaSettings)
    kafka, postgres = settings.need_kafka(), settings.need_postgres()
    await verify_topics(kafka)
    async with AsyncExitStack() as exits:
        sandbox = await exits.enter_async_context(Sandbox(sandbox_limits(urza_settings)))  # first: it starts slowly
        pool = await exits.enter_async_context(connect_pool(postgres))
        urza = Urza(
            reader=ProjectionReader(pool, postgres),
            producer=await exits.enter_async_context(OonaProducer(kafka, client_id="urza")),
            blobs=await exits.enter_async_context(BlobStore(settings.need_s3())),
            sandbox=sandbox,
            settings=urza_settings,
        )
        port = urza.metrics.serve(urza_settings.metrics_address)
        exits.callback(urza.metrics.stop)
        _log.info("urza.metrics_served", port=port)
        loops = {name: _run_loop(urza, name, step) for name, step in _loop_steps(urza).items()}
        loops["heartbeat"] = urza.metrics.health.keep_beating()
        tasks = [asyncio.create_task(loop, name=f"urza-{name}") for name, loop in loops.items()]
        try:
            yield urza
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _loop_steps(urza: Urza) -> dict[str, Step]:
    examined = ExaminedKernels()
    certifier = Certifier(urza.reader, urza.producer, urza.sandbox, urza.settings, examined)
    builder = KernelBuilder(urza.reader, urza.producer, urza.blobs, urza.sandbox, urza.settings, examined)
    is_proposed = is_complete = False

    async def certify() -> bool:
        nonlocal is_proposed, is_complete
        if not is_proposed:
            _log.info("catalogue.proposed", proposals=await propose_shipped(urza.producer, urza.reader))
            is_proposed = True
        if not is_complete and (is_complete := await are_shipped_validated(urza.reader)):
            _log.info("catalogue.completed")
        await certifier.certify_pending()
        return is_complete

    async def build_kernels() -> bool:
        await builder.build_wanted()
        return True

    return {"certification": certify, "kernels": build_kernels}


async def _run_loop(urza: Urza, name: str, step: Step) -> None:
    urza.loops_complete[name], backoff = False, Backoff(*RETRY_S)
    while True:
        try:
            urza.loops_complete[name] = await step()
            backoff.reset()
            await asyncio.sleep(urza.settings.poll_s)
        except Exception as error:
            urza.loops_complete[name], wait_s = False, backoff.next_s()
            if isinstance(error, TRANSIENT):
                _log.warning("urza.delayed", loop=name, error=str(error), retry_s=round(wait_s, 3))
            else:  # a bug must not end the loop: Urza would look alive and do nothing
                _log.exception("urza.failed", loop=name, retry_s=round(wait_s, 3))
            await asyncio.sleep(wait_s)
