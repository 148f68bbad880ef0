"""ProjectionWorker: what a worker holds open, and what it does with each batch.

Owns the pool, the producer for dead letters, the slot and the metrics. It refuses to open on a
log that does not fit the projections; later, a partition that cannot go on is stopped and
shown red, while the others go on. No exception leaves ``fold``: a Faust agent would ack the batch.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg

from esper.config import Settings, state_dir
from esper.errors import EsperError, NewerVersionError, PositionError
from esper.logging import get_logger
from esper.oona.admin.read_access import verify_group, verify_readable
from esper.oona.admin.topics import cluster_id, verify_topics
from esper.oona.broker_errors import TRANSIENT_ERRORS as KAFKA_TRANSIENT_ERRORS
from esper.oona.producer import OonaProducer
from esper.oona.progress_watch import ProgressWatch, StallReporter
from esper.oona.records import TopicPartition
from esper.retry import Attempts, retry_forever
from esper.schemas.topics import TOPICS
from esper.streams.database.connection_types import Connection, Pool
from esper.streams.database.connections import connect_pool
from esper.streams.database.health_window_partitions import drop_expired
from esper.streams.database.postgres_errors import DRIVER_ERRORS as POSTGRES_DRIVER_ERRORS
from esper.streams.database.postgres_errors import TRANSIENT_ERRORS as POSTGRES_TRANSIENT_ERRORS
from esper.streams.database.postgres_errors import postgres_error
from esper.streams.database.sql_queries import queries
from esper.streams.database.stored_positions import (
    check_order,
    check_position,
    claim_cluster,
    stored_positions,
    verify_log,
)
from esper.streams.dead_letters import send_pending_dead_letters
from esper.streams.settings import StreamsSettings
from esper.streams.worker.batch_projection import Batch, project_batch
from esper.streams.worker.member_ids import acquire_member_id
from esper.streams.worker.partition_cache import PartitionCache
from esper.streams.worker.worker_metrics import WorkerMetrics

TRANSIENT = (*KAFKA_TRANSIENT_ERRORS, *POSTGRES_TRANSIENT_ERRORS)

RETRY_FIRST_S = 0.1
LOOK_TIMEOUT_S = 5.0  # for a look at the cluster: the next one comes soon

_log = get_logger(__name__)


class ProjectionWorker:
    """Async: ``open`` before the first batch, ``close`` after the last."""

    def __init__(self, settings: Settings, streams: StreamsSettings) -> None:
        self.metrics = WorkerMetrics()
        self.instance_id = ""
        self._settings = settings
        self._streams = streams
        self._exits = AsyncExitStack()
        self._red: dict[TopicPartition, str] = {}
        self._caches: dict[TopicPartition, PartitionCache] = {}
        self._begins: dict[TopicPartition, int] = {}
        self._misfits: set[TopicPartition] = set()
        self._watch = ProgressWatch(streams.stalled_after_s)
        self._teller = StallReporter("worker")
        self._pool: Pool
        self._producer: OonaProducer | None = None

    async def open(self) -> None:
        """Check that topics, log and projections fit, then open everything.

        Raises:
            ConfigError, NotAllowedError, UnavailableError, PositionError, ConflictError: with what to do.
        """
        kafka, postgres = self._settings.need_kafka(), self._settings.need_postgres()
        async with AsyncExitStack() as exits:
            await verify_topics(kafka)
            await verify_group(kafka, self._streams.group)
            await verify_readable(kafka, [t.name for t in TOPICS])
            self._pool = await exits.enter_async_context(
                connect_pool(postgres, transaction_timeout_s=self._streams.transaction_timeout_s)
            )
            try:
                async with self._pool.acquire() as connection:
                    await verify_log(connection, kafka)
            except POSTGRES_DRIVER_ERRORS as error:
                raise postgres_error(error, postgres) from error
            self._producer = await exits.enter_async_context(OonaProducer(kafka, client_id="esper-streams"))
            slot = acquire_member_id(state_dir() / "slots", self._streams.member_id)
            exits.callback(slot.release)
            self.instance_id = slot.instance_id
            port = self.metrics.serve(self._streams.metrics_address)
            exits.callback(self.metrics.stop)
            beating = asyncio.create_task(self.metrics.health.keep_beating(), name="worker-beat")
            exits.callback(beating.cancel)
            self._exits = exits.pop_all()
        _log.info("worker.opened", instance=self.instance_id, metrics_port=port)

    async def close(self) -> None:
        """Close what ``open`` opened."""
        await self._exits.aclose()

    async def project(self, batch: Batch, is_current: Callable[[], bool]) -> None:
        """Fold a batch; try again for as long as Postgres or Kafka is away.

        Args:
            is_current: says False once the partition was given out anew, so that another reader's
                position counts.
        """
        place = (batch.topic, batch.partition)
        if place in self._red:
            return
        try:
            async for attempt in self.retries(TRANSIENT):
                with attempt:
                    await self._fold_once(batch)
            self._watch.reached(place, batch.end)
        except PositionError as error:
            if is_current():
                self._stop(place, str(error))
        except NewerVersionError as error:
            self._stop(place, str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _log.exception("projection.failed", topic=batch.topic, partition=batch.partition, start=batch.start)
            self._stop(place, f"{type(error).__name__}: {error}")

    def retries(self, on: tuple[type[Exception], ...]) -> Attempts:
        """Attempts without end, for what waiting can mend."""
        return retry_forever(on, RETRY_FIRST_S, self._streams.retry_max_delay_s)

    def is_red(self, place: TopicPartition) -> bool:
        """Whether a partition was stopped."""
        return place in self._red

    def verify_fetched(
        self,
        place: TopicPartition,
        start: int,
        fetched: int,
        first: Mapping[TopicPartition, int],
        last: Mapping[TopicPartition, int],
    ) -> bool:
        """Stop a partition whose log does not hold ``start`` any more, where ``fetched`` was read instead.

        Returns:
            Whether what was read follows.
        """
        try:
            check_position(place, start, first, last)
            check_order(place, start, fetched)
        except PositionError as error:
            self._stop(place, str(error))
        return place not in self._red

    async def verify_cluster(self) -> None:
        """Stop everything where the broker was wiped under this worker. Says nothing where it does not answer."""
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S), self._pool.acquire() as connection:
                await self._claim_cluster(connection)
        except PositionError as error:
            _log.error("worker.refused", reason=str(error))
            for place in sorted(self._watch.places - self._red.keys()):
                self._stop(place, str(error))
        except (*TRANSIENT, EsperError) as error:
            _log.info("cluster_id.lookup_failed", error=repr(error))

    async def _claim_cluster(self, connection: Connection) -> None:
        kafka = self._settings.need_kafka()
        await claim_cluster(connection, await cluster_id(kafka), kafka)

    async def positions(
        self, assigned: set[TopicPartition], first: Mapping[TopicPartition, int], last: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """The offset to read each partition from, checked against the log as it is now.

        Args:
            first: the oldest offset of each partition; ``last`` the next one to be written.
        """
        async with self._pool.acquire() as connection:
            stored = await stored_positions(connection)
            wrong_log = None
            try:
                await self._claim_cluster(connection)
            except PositionError as error:
                wrong_log = str(error)
            else:
                await self._send_left_letters(connection, assigned)
        self._caches.clear()
        self._begins = {place: first.get(place, 0) for place in assigned - stored.keys()}
        for place in self._watch.places - assigned:
            self._watch.end(place)
        positions = {place: stored.get(place, first.get(place, 0)) for place in sorted(assigned)}
        self.metrics.partitions_assigned(positions)
        for place in positions:
            self._red.pop(place, None)
            self._watch.begin(place, positions[place])
            try:
                if wrong_log is not None:
                    raise PositionError(wrong_log)
                check_position(place, positions[place], first, last)
            except PositionError as error:
                self._stop(place, str(error))
        return positions

    async def drop_expired(self) -> None:
        """Drop the health windows that are past their time; where Postgres does not let it, the next look does."""
        before = datetime.now(UTC) - timedelta(hours=self._streams.window_retention_h)
        try:
            async with self._pool.acquire() as connection:
                await drop_expired(connection, before)
        except (*TRANSIENT, asyncpg.PostgresError) as error:  # not the owner's right, say: no reason to stop folding
            _log.warning("windows.drop_failed", reason=f"{error!r:.200}")

    def reached(self) -> Mapping[TopicPartition, int]:
        """How far each partition of this worker is."""
        return self._watch.offsets()

    def watch(
        self,
        ends: Mapping[TopicPartition, int | None],
        reached: Mapping[TopicPartition, int],
        first: Mapping[TopicPartition, int],
    ) -> None:
        """Tell of the partitions that do not get on: in the log, and to Prometheus.

        Args:
            ends: the end of each partition's log; None where the broker did not say.
            reached: how far each was before the broker was asked.
            first: the oldest offset of each whose fetched batches are all folded.
        """
        misfits = {}
        for place, offset in reached.items():
            end = ends.get(place)
            try:
                check_position(place, offset, first, {place: offset if end is None else end})
            except PositionError as error:
                misfits[place] = str(error)
        for place in sorted(self._misfits & misfits.keys() - self._red.keys()):
            self._stop(place, misfits[place])
        self._misfits = set(misfits)  # a new leader may say too little for a moment: told at the second look
        stalls = self._watch.stalls(ends)
        self._teller.tell(stalls)
        self.metrics.update_positions(ends, stalls)

    async def _send_left_letters(self, connection: Connection, assigned: set[TopicPartition]) -> None:
        """Send what an earlier owner of these partitions decided on and did not get to send."""
        assert self._producer is not None
        rows = [row async for row in queries("dead_letters").all_pending(connection)]
        for place in sorted({(row["topic"], row["log_partition"]) for row in rows} & assigned):
            try:
                await send_pending_dead_letters(connection, *place, self._producer)
            except EsperError as error:
                # they wait on; the next letter or assignment takes them along
                _log.warning("dead_letters.delayed", topic=place[0], partition=place[1], error=str(error))

    async def _fold_once(self, batch: Batch) -> None:
        assert self._producer is not None
        may_begin = self._begins.get((batch.topic, batch.partition)) == batch.start
        try:
            with self.metrics.time_batch(batch.topic):
                async with self._pool.acquire() as connection:
                    cache = self._caches.setdefault((batch.topic, batch.partition), PartitionCache())
                    projected = await project_batch(connection, replace(batch, may_begin=may_begin), cache=cache)
                    if projected.has_letters:
                        await send_pending_dead_letters(connection, batch.topic, batch.partition, self._producer)
        except TRANSIENT as error:
            self._watch.troubled((batch.topic, batch.partition), f"it cannot be folded: {error!r:.200}")
            self.metrics.batch_retried(batch.topic, error)
            raise
        self.metrics.batch_projected(batch, projected.num_events, projected.transaction_s)

    def _stop(self, place: TopicPartition, reason: str) -> None:
        topic, partition = place
        self._red[place] = reason
        self._watch.stopped(place, reason)
        self.metrics.partition_stopped(place, reason)
        _log.error("partition.stopped", topic=topic, partition=partition, reason=reason)
