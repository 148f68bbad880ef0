"""The Faust app: one agent per topic passes batches to the ``ProjectionWorker``.

Owns the Faust configuration, the agents and the periodic checks; ``ProjectionWorker`` handles the batches.
"""

import asyncio
import gc
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any, cast

import faust
from faust.auth import SASLCredentials, SSLCredentials
from faust.types import TP
from yarl import URL

from esper.config import KafkaSettings, Settings, load_settings
from esper.errors import EsperError
from esper.logging import configure_logging, get_logger
from esper.oona.broker_errors import CLIENT_ERRORS
from esper.oona.client_options import tls_context
from esper.oona.records import TopicPartition
from esper.schemas.topics import TOPICS
from esper.streams.settings import StreamsSettings
from esper.streams.worker.faust_batches import BatchSchema, BatchTransport
from esper.streams.worker.partition_executor import PartitionExecutor
from esper.streams.worker.projection_worker import TRANSIENT, Offsets, ProjectionWorker

EXIT_REFUSED = 1
GC_ALLOCATIONS, GC_GENERATIONS = 100_000, (20, 20)  # a batch allocates 100,000 objects without cycles
DROP_EXPIRED_EVERY_S = 600.0
PROGRESS_CHECK_EVERY_S = 5.0
CLUSTER_CHECK_EVERY = 4  # progress checks between two checks of the cluster id
UNKNOWN_BROKER = "127.0.0.1:9092"  # a placeholder: a worker without Kafka settings refuses to start

_log = get_logger(__name__)


class EsperApp(faust.App):
    """A Faust app that reads batches, from the positions that Postgres holds.

    Faust's TP is a named tuple, equal to the plain (topic, partition) of Oona.
    """

    projection_worker: ProjectionWorker
    executor: PartitionExecutor
    settings: Settings

    def _new_transport(self) -> Any:
        return BatchTransport(self.conf.broker_consumer, self)

    def _create_directories(self) -> None:
        """Create nothing: the app has no tables, and Faust's folder for them would stay empty."""

    async def on_start(self) -> None:
        """Open the ``ProjectionWorker``. If it refuses, log the reason in one line and exit with code 1."""
        configure_logging(self.settings.logging)  # Faust replaced the handlers
        for name in ("faust", "mode"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            await self.projection_worker.open()
        except EsperError as error:
            _log.error("worker.refused", reason=str(error))
            raise SystemExit(EXIT_REFUSED) from None
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS, *GC_GENERATIONS)
        self.conf.consumer_group_instance_id = f"{self.conf.id}-{self.projection_worker.instance_id}"
        await super().on_start()

    async def on_stop(self) -> None:
        """Close the ``ProjectionWorker`` after everything that uses it."""
        await super().on_stop()
        await self.executor.close()
        await self.projection_worker.close()

    async def load_positions(self, assigned: set[TP]) -> Mapping[TP, int]:
        """The stored positions of the assigned partitions. Retries while Postgres or Kafka is unavailable."""
        async for attempt in self.projection_worker.retries((*TRANSIENT, *CLIENT_ERRORS)):
            with attempt:
                bounds = await self._log_bounds(*assigned)
                found = await self.projection_worker.assign(assigned, *bounds)
        return {TP(*partition): offset for partition, offset in found.items()}

    async def may_deliver(self, tp: TP, start: int, fetched: int) -> bool:
        """Whether records from offset ``fetched`` on may be projected after offset ``start``.

        The client silently moves to the log's first offset if the log no longer holds ``start``. A gap within the log
        (expired or aborted records) looks the same, so this reads the bounds of the log from the broker.
        """
        if self.projection_worker.is_stopped(tp):
            return False
        if fetched == start:
            return True
        async for attempt in self.projection_worker.retries(CLIENT_ERRORS):
            with attempt:
                bounds = await self._log_bounds(tp)
        return self.projection_worker.verify_fetched(tp, start, fetched, *bounds)

    async def _log_bounds(self, *assigned: TP) -> tuple[Offsets, Offsets]:
        """The oldest offset and the end of the log of each partition."""
        consumer: Any = self.consumer
        return await consumer.earliest_offsets(*assigned), await consumer.highwaters(*assigned)


def make_app() -> EsperApp:
    """Create the app of this process from its environment. Opens no connection.

    An invalid setting ends the process with one line, where Faust would print a traceback.
    """
    try:
        return build_app(load_settings())
    except EsperError as error:
        print(f"esper: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(EXIT_REFUSED) from None


def build_app(settings: Settings) -> EsperApp:
    """Create an app with its agents and periodic checks."""
    streams = settings.section("streams", StreamsSettings)
    brokers = settings.kafka.bootstrap_servers if settings.kafka else UNKNOWN_BROKER
    app = EsperApp(
        streams.group,
        broker=[URL(f"kafka://{server.strip()}") for server in brokers.split(",")],
        broker_credentials=broker_credentials(settings.kafka) if settings.kafka else None,
        store="memory://",
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        worker_redirect_stdouts=False,
        stream_wait_empty=False,
        stream_buffer_maxsize=streams.buffered_batches,
        broker_max_poll_records=streams.max_batch_records,
        broker_session_timeout=streams.session_timeout_s,
        broker_heartbeat_interval=streams.session_timeout_s / 4,
        consumer_auto_offset_reset="earliest",
    )
    app.settings = settings
    app.projection_worker = ProjectionWorker(settings, streams)
    app.executor = PartitionExecutor(streams.concurrent_batches, streams.buffered_batches)
    for spec in TOPICS:
        app.agent(app.topic(spec.name, schema=BatchSchema()), name=f"project-{spec.name}")(_projection_agent(app))
    app.task(_check_progress_periodically)
    app.task(_drop_expired_periodically)
    app.on_rebalance_complete.connect(cast(Any, _log_ready), weak=False)
    return app


def broker_credentials(kafka: KafkaSettings) -> SSLCredentials | SASLCredentials | None:
    """Kafka credentials for Faust's clients, equivalent to ``esper.oona.client_options`` for the others.

    Raises:
        ConfigError: a certificate file cannot be read.
    """
    security = kafka.security
    context = tls_context(kafka) if security.uses_tls else None
    if not security.uses_sasl:
        return SSLCredentials(context) if context is not None else None
    assert security.password is not None
    return SASLCredentials(
        username=security.username,
        password=security.password.get_secret_value(),
        ssl_context=context,
        mechanism=security.mechanism,
    )


def _projection_agent(app: EsperApp) -> Any:
    async def project(event: Any) -> None:
        generation_id = event.message.generation_id
        await app.projection_worker.project(event.value, lambda: generation_id == app.consumer_generation_id)
        event.ack()

    async def agent(stream: Any) -> AsyncIterator[None]:
        async for event in stream.noack().events():
            batch = event.value
            await app.executor.put((batch.topic, batch.partition), partial(project, event))
            yield

    return agent


async def _check_progress_periodically(app: Any) -> None:
    """Check every few seconds that each partition makes progress: a stall must never be silent."""
    for number in itertools.count():
        await asyncio.sleep(PROGRESS_CHECK_EVERY_S)
        if app.should_stop:
            return
        if number % CLUSTER_CHECK_EVERY == 0:
            await app.projection_worker.verify_cluster()
        assigned = app.consumer.assignment()
        offsets = app.projection_worker.offsets()
        ends: dict[TopicPartition, int | None] = dict.fromkeys(assigned)
        first: Mapping[TP, int] = {}
        try:
            async with asyncio.timeout(PROGRESS_CHECK_EVERY_S):
                first = await app.consumer.earliest_offsets(*assigned)
                ends |= await app.consumer.highwaters(*assigned)
        except CLIENT_ERRORS:
            pass  # the ends stay unknown, and are reported as such
        idle = {tp: offset for tp, offset in first.items() if not app.consumer.has_in_flight(tp)}
        app.projection_worker.check_progress(ends, offsets, idle)


async def _drop_expired_periodically(app: Any) -> None:
    """Drop expired health windows at an interval."""
    while not app.should_stop:
        await app.projection_worker.drop_expired()
        await app.sleep(DROP_EXPIRED_EVERY_S)


async def _log_ready(app: Any, **_fields: Any) -> None:
    _log.info("worker.ready", instance=app.projection_worker.instance_id, partitions=len(app.consumer.assignment()))
