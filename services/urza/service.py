"""Urza's process: the API, and the loop that keeps catalogue and kernels complete."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from esper.config import Settings
from esper.errors import ContractError, NotAllowedError, UnavailableError
from esper.logging import get_logger
from esper.oona.producer import OonaProducer
from esper.oona.topics import verify_topics
from esper.services.urza.catalogue import ship
from esper.services.urza.compiling import Compiler
from esper.services.urza.metrics import UrzaMetrics
from esper.services.urza.settings import UrzaSettings
from esper.storage.blobs import BlobStore
from esper.streams.database import connect_pool

RETRY_S = (0.2, 5.0)
TRANSIENT = (UnavailableError, NotAllowedError, ContractError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError)

_log = get_logger(__name__)


@dataclass(slots=True)
class Urza:
    """What the process holds open. ``is_ready`` is False while something it needs is away."""

    pool: Any
    producer: OonaProducer
    blobs: BlobStore
    settings: UrzaSettings
    is_ready: bool = False
    metrics: UrzaMetrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = UrzaMetrics(lambda: self.is_ready)


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
            pool=await exits.enter_async_context(connect_pool(settings.need_postgres())),
            producer=await exits.enter_async_context(OonaProducer(kafka, client_id="urza")),
            blobs=await exits.enter_async_context(BlobStore(settings.need_s3())),
            settings=own,
        )
        port = urza.metrics.serve(own.metrics_address)
        exits.callback(urza.metrics.stop)
        _log.info("urza.metrics", port=port)
        works = {"keeping": _keep_complete(urza), "beat": urza.metrics.health.keep_beating()}
        beside = [asyncio.create_task(work, name=f"urza-{name}") for name, work in works.items()]
        try:
            yield urza
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


async def _keep_complete(urza: Urza) -> None:
    compiler = Compiler(urza.producer, urza.blobs, urza.settings.kernel_seed)
    wait_s, is_shipped = RETRY_S[0], False
    while True:
        try:
            async with urza.pool.acquire() as connection:
                if not is_shipped:
                    _log.info("catalogue.shipped", requests=await ship(urza.producer, connection))
                    is_shipped = True
                await compiler.compile_wanted(connection)
            urza.is_ready, wait_s = True, RETRY_S[0]
            await asyncio.sleep(urza.settings.poll_s)
        except TRANSIENT as error:
            urza.is_ready = False
            _log.warning("urza.waiting", error=str(error), retry_s=wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_S[1])
