"""The resources of a worker process, and the handling of each batch.

Owns the Postgres pool, the producer of dead letters, the group member id, the metrics and the set of stopped
partitions. It refuses to open if the log does not match the projections. Later, it stops a partition that cannot
continue, while the others go ahead.

Invariant: no exception leaves ``project``, since a Faust agent would acknowledge the batch.
"""

import asyncio
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
from tenacity import AsyncRetrying

from esper.config import Settings, state_dir
from esper.errors import EsperError, NewerVersionError, PositionError
from esper.logging import get_logger
from esper.oona.admin.read_access import verify_group, verify_readable
from esper.oona.admin.topics import cluster_id, verify_topics
from esper.oona.broker_errors import TRANSIENT_ERRORS as KAFKA_TRANSIENT_ERRORS
from esper.oona.producer import OonaProducer
from esper.oona.progress_watch import ProgressWatch, StallReporter
from esper.oona.records import TopicPartition
from esper.retry import retry_forever
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
CLUSTER_CHECK_TIMEOUT_S = 5.0  # short, since the check is repeated

Offsets = Mapping[TopicPartition, int]

_log = get_logger(__name__)


class ProjectionWorker:
    """Projects batches. ``open`` it before the first batch, ``close`` it after the last one."""

    def __init__(self, settings: Settings, streams: StreamsSettings) -> None:
        self.metrics = WorkerMetrics()
        self.instance_id = ""
        self._settings = settings
        self._streams = streams
        self._exits = AsyncExitStack()
        self._stopped: dict[TopicPartition, str] = {}
        self._caches: dict[TopicPartition, PartitionCache] = {}
        self._log_starts: dict[TopicPartition, int] = {}  # of the partitions without a stored position
        self._mismatched: set[TopicPartition] = set()
        self._watch = ProgressWatch(streams.stalled_after_s)
        self._stall_reporter = StallReporter("worker")
        self._pool: Pool
        self._producer: OonaProducer | None = None

    async def open(self) -> None:
        """Check topics, access rights, log and projections, then open everything.

        Raises:
            ConfigError, NotAllowedError, UnavailableError, PositionError, ConflictError: a check failed; the message
                has the remedy.
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
            member = acquire_member_id(state_dir() / "member_ids", self._streams.member_id)
            exits.callback(member.release)
            self.instance_id = member.instance_id
            port = self.metrics.serve(self._streams.metrics_address)
            exits.callback(self.metrics.stop)
            heartbeat = asyncio.create_task(self.metrics.health.keep_beating(), name="worker-beat")
            exits.callback(heartbeat.cancel)
            self._exits = exits.pop_all()
        _log.info("worker.opened", instance=self.instance_id, metrics_port=port)

    async def close(self) -> None:
        """Close everything that ``open`` opened."""
        await self._exits.aclose()

    async def project(self, batch: Batch, is_current: Callable[[], bool]) -> None:
        """Project a batch; retry for as long as Postgres or Kafka is unavailable.

        Args:
            is_current: returns False after a rebalance. A position error then means that another worker has the
                partition, not that this one must stop it.
        """
        tp = (batch.topic, batch.partition)
        if tp in self._stopped:
            return
        try:
            async for attempt in self.retries(TRANSIENT):
                with attempt:
                    await self._project_once(batch)
            self._watch.advance(tp, batch.end)
        except PositionError as error:
            if is_current():
                self._stop(tp, str(error))
        except NewerVersionError as error:
            self._stop(tp, str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _log.exception("projection.failed", topic=batch.topic, partition=batch.partition, start=batch.start)
            self._stop(tp, f"{type(error).__name__}: {error}")

    def retries(self, on: tuple[type[Exception], ...]) -> AsyncRetrying:
        """Unlimited attempts, with the backoff of the settings."""
        return retry_forever(on, RETRY_FIRST_S, self._streams.retry_max_delay_s)

    def is_stopped(self, tp: TopicPartition) -> bool:
        """Whether this worker stopped a partition."""
        return tp in self._stopped

    def verify_fetched(self, tp: TopicPartition, start: int, fetched: int, first: Offsets, last: Offsets) -> bool:
        """Whether records from ``fetched`` on continue at ``start``; stops the partition if they do not.

        Args:
            first: the oldest offset of the partition; ``last`` the end of its log.
        """
        try:
            check_position(tp, start, first, last)
            check_order(tp, start, fetched)
        except PositionError as error:
            self._stop(tp, str(error))
        return tp not in self._stopped

    async def verify_cluster(self) -> None:
        """Stop every partition if the broker was wiped. Does nothing if Kafka or Postgres does not answer."""
        try:
            async with asyncio.timeout(CLUSTER_CHECK_TIMEOUT_S), self._pool.acquire() as connection:
                await self._claim_cluster(connection)
        except PositionError as error:
            _log.error("worker.refused", reason=str(error))
            for tp in sorted(self._watch.partitions - self._stopped.keys()):
                self._stop(tp, str(error))
        except (*TRANSIENT, EsperError) as error:
            _log.info("cluster_id.lookup_failed", error=repr(error))

    async def _claim_cluster(self, connection: Connection) -> None:
        kafka = self._settings.need_kafka()
        await claim_cluster(connection, await cluster_id(kafka), kafka)

    async def assign(
        self, assigned: AbstractSet[TopicPartition], first: Offsets, last: Offsets
    ) -> dict[TopicPartition, int]:
        """Take over partitions, and return the offset to read each one from. Stops those that do not match the log.

        Args:
            first: the oldest offset of each partition; ``last`` the end of its log.
        """
        async with self._pool.acquire() as connection:
            stored = await stored_positions(connection)
            cluster_error = None
            try:
                await self._claim_cluster(connection)
            except PositionError as error:
                cluster_error = str(error)
            else:
                await self._send_pending_dead_letters(connection, assigned)
        self._caches.clear()
        self._log_starts = {tp: first.get(tp, 0) for tp in assigned - stored.keys()}
        for tp in self._watch.partitions - assigned:
            self._watch.revoke(tp)
        positions = {tp: stored.get(tp, first.get(tp, 0)) for tp in sorted(assigned)}
        self.metrics.partitions_assigned(positions)
        for tp in positions:
            self._stopped.pop(tp, None)
            self._watch.assign(tp, positions[tp])
            try:
                if cluster_error is not None:
                    raise PositionError(cluster_error)
                check_position(tp, positions[tp], first, last)
            except PositionError as error:
                self._stop(tp, str(error))
        return positions

    async def drop_expired(self) -> None:
        """Drop expired health windows. A failure is logged, and the next round retries."""
        before = datetime.now(UTC) - timedelta(hours=self._streams.window_retention_h)
        try:
            async with self._pool.acquire() as connection:
                await drop_expired(connection, before)
        except (*TRANSIENT, asyncpg.PostgresError) as error:  # a missing privilege, say, must not stop projection
            _log.warning("windows.drop_failed", reason=f"{error!r:.200}")

    def offsets(self) -> Offsets:
        """The next offset of each assigned partition."""
        return self._watch.offsets()

    def check_progress(self, ends: Mapping[TopicPartition, int | None], offsets: Offsets, first: Offsets) -> None:
        """Report stalled partitions to the log and to Prometheus, and stop those that left the log's range.

        Args:
            ends: the end of each partition's log; None if the broker did not answer.
            offsets: the next offset of each partition, read before the broker was asked.
            first: the oldest offset of each partition that has no batch in flight.
        """
        mismatches = {}
        for tp, offset in offsets.items():
            end = ends.get(tp)
            try:
                check_position(tp, offset, first, {tp: offset if end is None else end})
            except PositionError as error:
                mismatches[tp] = str(error)
        # a new leader can report too low an end for a moment: only the second mismatch in a row counts
        for tp in sorted(self._mismatched & mismatches.keys() - self._stopped.keys()):
            self._stop(tp, mismatches[tp])
        self._mismatched = set(mismatches)
        stalls = self._watch.stalls(ends)
        self._stall_reporter.report(stalls)
        self.metrics.update_positions(ends, stalls)

    async def _send_pending_dead_letters(self, connection: Connection, assigned: AbstractSet[TopicPartition]) -> None:
        """Send the dead letters that an earlier owner of these partitions committed and did not send."""
        assert self._producer is not None
        rows = [row async for row in queries("dead_letters").all_pending(connection)]
        for topic, partition in sorted({(row["topic"], row["log_partition"]) for row in rows} & assigned):
            try:
                await send_pending_dead_letters(connection, topic, partition, self._producer)
            except EsperError as error:
                # they stay in the table; the next dead letter or assignment sends them
                _log.warning("dead_letters.delayed", topic=topic, partition=partition, error=str(error))

    async def _project_once(self, batch: Batch) -> None:
        assert self._producer is not None
        tp = (batch.topic, batch.partition)
        may_begin = self._log_starts.get(tp) == batch.start
        try:
            with self.metrics.time_batch(batch.topic):
                async with self._pool.acquire() as connection:
                    cache = self._caches.setdefault(tp, PartitionCache())
                    projected = await project_batch(connection, replace(batch, may_begin=may_begin), cache=cache)
                    if projected.has_dead_letters:
                        await send_pending_dead_letters(connection, batch.topic, batch.partition, self._producer)
        except TRANSIENT as error:
            self._watch.note_problem(tp, f"the batch cannot be projected: {error!r:.200}")
            self.metrics.batch_retried(batch.topic, error)
            raise
        self.metrics.batch_projected(batch, projected.num_events, projected.transaction_s)

    def _stop(self, tp: TopicPartition, reason: str) -> None:
        topic, partition = tp
        self._stopped[tp] = reason
        self._watch.stop(tp, reason)
        self.metrics.partition_stopped(tp, reason)
        _log.error("partition.stopped", topic=topic, partition=partition, reason=reason)
