"""The Faust app: one agent per topic, each handing its batches to the ``ProjectionWorker``."""

import asyncio
import gc
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any, cast

import faust
from aiokafka.errors import KafkaError
from faust.auth import SASLCredentials, SSLCredentials
from faust.types import TP
from yarl import URL

from esper.config import KafkaSettings, Settings, load_settings
from esper.errors import EsperError
from esper.logging import configure_logging, get_logger
from esper.oona.client_options import tls_context
from esper.oona.records import TopicPartition
from esper.schemas.topics import TOPICS
from esper.streams.settings import StreamsSettings
from esper.streams.worker.faust_batches import BatchSchema, BatchTransport
from esper.streams.worker.partition_executor import PartitionExecutor
from esper.streams.worker.projection_worker import TRANSIENT, ProjectionWorker

EXIT_REFUSED = 1
GC_ALLOCATIONS, GC_GENERATIONS = 100_000, (20, 20)  # a batch is a hundred thousand objects without a cycle among them
RETENTION_S = 600.0  # between two looks for windows that are past their time
WATCH_S = 5.0  # between two looks at how far each partition is
CLUSTER_LOOKS = 4  # every so many of them: is it still the same cluster?
UNKNOWN_BROKER = "127.0.0.1:9092"  # never connected to: a worker without settings refuses to start

_log = get_logger(__name__)


class EsperApp(faust.App):
    """A Faust app that reads in batches and starts from Postgres."""

    projection_worker: ProjectionWorker
    executor: PartitionExecutor
    settings: Settings

    def _new_transport(self) -> Any:
        return BatchTransport(self.conf.broker_consumer, self)

    async def on_start(self) -> None:
        """Open the folder; where it refuses, say why in one line and end with exit code 1."""
        configure_logging(self.settings.logging)  # Faust has put handlers of its own in place
        for chatty in ("faust", "mode"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
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
        """Close the folder after everything that uses it."""
        await super().on_stop()
        await self.executor.close()
        await self.projection_worker.close()

    async def load_positions(self, assigned: set[TP]) -> Mapping[TP, int]:
        """Where to read each assigned partition from: Postgres says. Waits for as long as it or Kafka is away."""
        async for attempt in self.projection_worker.retries((*TRANSIENT, KafkaError)):
            with attempt:
                first = await self.consumer.earliest_offsets(*assigned)
                last = await self.consumer.highwaters(*assigned)
                found = await self.projection_worker.positions(
                    {(tp.topic, tp.partition) for tp in assigned}, _by_place(first), _by_place(last)
                )
        return {TP(*place): offset for place, offset in found.items()}

    async def may_deliver(self, tp: TP, start: int, fetched: int) -> bool:
        """Whether what was fetched, from offset ``fetched`` on, is what follows offset ``start``.

        The client moves to the log's first offset where the log does not hold its own; a hole within the log
        (expired or aborted records) looks the same, so the broker is asked.
        """
        place = (tp.topic, tp.partition)
        if self.projection_worker.is_red(place):
            return False
        if fetched == start:
            return True
        async for attempt in self.projection_worker.retries((KafkaError, OSError)):
            with attempt:
                first = await self.consumer.earliest_offsets(tp)
                last = await self.consumer.highwaters(tp)
        return self.projection_worker.verify_fetched(place, start, fetched, _by_place(first), _by_place(last))


def make_app() -> EsperApp:
    """The app of this process, by its environment. Connects to nothing yet.

    A setting that is wrong ends the process with one line: Faust would print its traceback.
    """
    try:
        return build_app(load_settings())
    except EsperError as error:
        print(f"esper: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(EXIT_REFUSED) from None


def build_app(settings: Settings) -> EsperApp:
    """An app with its agents."""
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
        app.agent(app.topic(spec.name, schema=BatchSchema()), name=f"fold-{spec.name}")(_folding_agent(app))
    app.task(_keep_watching)
    app.task(_keep_dropping)
    app.on_rebalance_complete.connect(cast(Any, _say_ready), weak=False)
    return app


def broker_credentials(kafka: KafkaSettings) -> SSLCredentials | SASLCredentials | None:
    """How Faust's own clients are let in: what ``esper.oona.client_options`` gives the others, in Faust's words.

    Raises:
        ConfigError: a certificate file cannot be used.
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


def _folding_agent(app: EsperApp) -> Any:
    async def fold(event: Any) -> None:
        await app.projection_worker.project(
            event.value, lambda: event.message.generation_id == app.consumer_generation_id
        )
        event.ack()

    async def agent(stream: Any) -> AsyncIterator[None]:
        async for event in stream.noack().events():
            batch = event.value
            await app.executor.put((batch.topic, batch.partition), partial(fold, event))
            yield

    return agent


async def _keep_watching(app: Any) -> None:
    """Look every few seconds whether each partition gets on; a worker is never silent about it."""
    for look in itertools.count():
        await asyncio.sleep(WATCH_S)
        if app.should_stop:
            return
        if look % CLUSTER_LOOKS == 0:
            await app.projection_worker.verify_cluster()
        assigned = app.consumer.assignment()
        reached = app.projection_worker.reached()
        ends: dict[TopicPartition, int | None] = dict.fromkeys((tp.topic, tp.partition) for tp in assigned)
        first: Mapping[TP, int] = {}
        try:
            async with asyncio.timeout(WATCH_S):
                first = await app.consumer.earliest_offsets(*assigned)
                ends |= _by_place(await app.consumer.highwaters(*assigned))
        except (KafkaError, OSError):
            pass  # the ends stay unknown, which is what is told
        idle = {tp: offset for tp, offset in first.items() if not app.consumer.has_in_flight(tp)}
        app.projection_worker.watch(ends, reached, _by_place(idle))


async def _keep_dropping(app: Any) -> None:
    """Drop what retention lets go, now and then."""
    while not app.should_stop:
        await app.projection_worker.drop_expired()
        await app.sleep(RETENTION_S)


async def _say_ready(app: Any, **_fields: Any) -> None:
    _log.info("worker.ready", instance=app.projection_worker.instance_id, partitions=len(app.consumer.assignment()))


def _by_place(offsets: Mapping[Any, int]) -> dict[TopicPartition, int]:
    return {(tp.topic, tp.partition): offset for tp, offset in offsets.items()}
