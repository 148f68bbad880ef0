"""GroupConsumer: reads events as a member of a consumer group, and commits them after the handler has returned.

Owns fetching, backpressure, rebalances and shutdown; ``PartitionReader`` owns what happens to a batch. Invariants:
one reader reads a partition, from the committed position (or the handler's own); before a partition is revoked, its
batch in progress is completed or cancelled, never left running.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import KafkaError

from esper.config import KafkaSettings
from esper.logging import get_logger
from esper.oona.admin.read_access import verify_group
from esper.oona.broker_errors import kafka_error
from esper.oona.client_options import CONNECT_TIMEOUT_S, client_options, started
from esper.oona.consumer.offset_commits import OffsetCommits
from esper.oona.consumer.partition_reader import Handler, PartitionReader, SendRecords
from esper.oona.log_reader import StoredRecord, to_stored_record
from esper.oona.progress_watch import STALLED_AFTER_S, ProgressWatch, Stall, StallReporter
from esper.oona.records import TopicPartition
from esper.retry import retry_forever
from esper.schemas.topics import TopicSpec

POLL_MS = 200
METADATA_MAX_AGE_MS = 10_000  # how late a recreated topic is noticed; until then its readers have no partitions
STALL_CHECK_S = 1.0
END_MAX_AGE_S = 10.0  # an end of the log that was reported earlier counts as unknown
LEAVE_TIMEOUT_S = 5.0  # for leaving the group: a broker that does not answer must not block a shutdown
START_RETRY_S = (0.1, 5.0)  # first and longest wait before a position is read again
MOVED_POSITION_S = 0.5  # before a position that another member moved is read again: a rebalance may follow

ANY_PARTITION = -1
LOST = "offsets {} to {} expired before they were read and are lost"
SHRUNK = "the log ends at {}, before the position {}: the broker was wiped, or this is the wrong one"
WENT_BACK = "the log returned offset {} where {} was expected: the topic was wiped and written again"

_log = get_logger(__name__)

LoadPositions = Callable[[Sequence[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]]


@dataclass(frozen=True, slots=True)
class GroupConsumerOptions:
    """Options of a ``GroupConsumer``.

    Args:
        max_batch_records: the most records in a batch. Three times as many are buffered for each partition; then its
            fetching pauses.
        finish_s: how long a batch in progress may take when its partition is revoked or the consumer stops, in
            seconds; then it is cancelled.
        session_timeout_s: after so many seconds without a heartbeat the broker removes a member from the group.
        stalled_after_s: a partition with unread records that makes no progress for so long makes the consumer
            unhealthy.
        instance_id: a stable name of this member (static membership); a restart then causes no rebalance.
    """

    max_batch_records: int = 500
    finish_s: float = 10.0
    session_timeout_s: float = 10.0
    stalled_after_s: float = STALLED_AFTER_S
    instance_id: str | None = None


class GroupConsumer:
    """Reads Esper's events as a member of a consumer group.

        async with GroupConsumer(load_settings().need_kafka(), "my-group", [LIFECYCLE], handle_batch) as consumer:
            await consumer.run()

    docs/examples/react_to_events.py is a complete program. Members with the same group share the partitions of the
    topics. A new group starts at the oldest records. Events of one partition, such as those of one run, come in order.
    Delivery is at least once: a batch is committed after the handler has returned, and is passed to it again when it
    raises or the process crashes before the commit. A handler that stores its own positions (``load_positions``)
    handles every event exactly once.

    Args:
        kafka: the broker's addresses and the client's credentials.
        group: the name of the consumer group.
        topics: constants of ``esper.schemas.topics``.
        handler: an async function that gets one ``EventBatch`` at a time for each partition; batches of different
            partitions are handled concurrently. Where it raises ``ConflictError``, the position is loaded again; any
            other error makes the same batch come again, after growing waits.
        load_positions: an async function that returns the positions that the handler has stored for the partitions
            it is passed. A partition that it does not return starts at its committed position.
        dead_letters: an async function that sends dead letters, as ``OonaProducer.send_records`` does. Without it, a
            record that cannot be decoded stops its partition.

    Entering the context joins the group; leaving it finishes batches in progress, commits and leaves the group.

    Raises:
        NotAllowedError: on entering: this client may not read a topic or join the group.
        UnavailableError: on entering: no broker answers.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        group: str,
        topics: Sequence[TopicSpec],
        handler: Handler,
        *,
        load_positions: LoadPositions | None = None,
        dead_letters: SendRecords | None = None,
        options: GroupConsumerOptions | None = None,
    ) -> None:
        self._kafka, self._group, self._topics = kafka, group, topics
        self._handler, self._load_positions, self._dead_letters = handler, load_positions, dead_letters
        self._options = options or GroupConsumerOptions()
        self._watch = ProgressWatch(self._options.stalled_after_s)
        self._readers: dict[TopicPartition, PartitionReader] = {}
        self._tasks: dict[TopicPartition, asyncio.Task[None]] = {}
        self._unassigned_since: float | None = time.monotonic()
        self._commits = OffsetCommits(lambda offsets: self._consumer.commit(offsets), group)
        self._is_stopping = asyncio.Event()
        self._exits = AsyncExitStack()
        self._consumer: Any = None

    async def __aenter__(self) -> Self:
        options = self._options
        self._consumer = AIOKafkaConsumer(
            **client_options(self._kafka),
            group_id=self._group,
            group_instance_id=options.instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(options.session_timeout_s * 1000),
            heartbeat_interval_ms=int(options.session_timeout_s * 250),
            rebalance_timeout_ms=int(1000 * (options.finish_s + options.session_timeout_s)),
            fetch_max_wait_ms=100,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
        )
        names = {t.name for t in self._topics}
        self._consumer.subscribe(sorted(names), listener=_Listener(self._finish, self._assign))
        await verify_group(self._kafka, self._group)
        join_timeout_s = CONNECT_TIMEOUT_S + options.finish_s + options.session_timeout_s  # a whole rebalance
        await self._exits.enter_async_context(started(self._consumer, self._kafka, join_timeout_s, topics=names))
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._finish(list(self._tasks))
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._exits.aclose()
        except TimeoutError:
            _log.warning("consumer.leave_timed_out", group=self._group, reason="no broker answers")

    @property
    def is_healthy(self) -> bool:
        """Whether every partition makes progress; for a readiness probe."""
        return not self.stalls()

    def stalls(self) -> list[Stall]:
        """The partitions that make no progress, with offset, lag and reason."""
        stalls = self._watch.stalls({tp: self._end_of(tp) for tp in self._readers})
        unassigned_s = time.monotonic() - self._unassigned_since if self._unassigned_since is not None else 0.0
        names = ",".join(t.name for t in self._topics)
        for idle_s, reason in (
            (unassigned_s, "the group has assigned no partition to this member"),
            (self._commits.failing_s, "the position cannot be committed"),
        ):
            if idle_s > self._options.stalled_after_s:
                stalls.append(Stall(names, ANY_PARTITION, 0, None, idle_s, reason))
        return stalls

    def stop(self) -> None:
        """Make ``run`` return. Leaving the context finishes the batches in progress."""
        self._is_stopping.set()

    async def run(self) -> None:
        """Read until ``stop`` or cancellation. Retries while the broker is away.

        Raises:
            UnavailableError, NotAllowedError: the broker refuses this member for good.
        """
        loops = {"watch": self._keep_watching, "commit": self._commits.keep_committing}
        tasks = [asyncio.create_task(loop(), name=f"{name}-{self._group}") for name, loop in loops.items()]
        try:
            while not self._is_stopping.is_set():
                fetched = await self._consumer.getmany(timeout_ms=POLL_MS)
                expected = {tp: self._readers.get(tp) for tp in fetched}
                for tp, records in fetched.items():
                    reader = self._readers.get(tp)
                    if reader is not None and reader is expected[tp]:  # else it was revoked or restarted in between
                        await self._enqueue(tp, reader, [to_stored_record(r) for r in records])
                self._pause_and_resume()
        except KafkaError as error:
            raise kafka_error(error, self._kafka) from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- rebalances -------------------------------------------------------------------------

    async def _assign(self, assigned: Sequence[KafkaTopicPartition]) -> None:
        """Start a task for each partition. Waits for nothing: the rebalance waits for this."""
        self._unassigned_since = None
        for tp in assigned:
            self._consumer.pause(tp)  # until its reader has a position
            self._watch.assign(tp)
            task = asyncio.create_task(self._read(tp), name=f"read-{tp.topic}-{tp.partition}")
            task.add_done_callback(partial(self._report_failure, tp))
            self._tasks[tp] = task
        _log.info("consumer.assigned", group=self._group, partitions=len(assigned))

    async def _read(self, tp: KafkaTopicPartition) -> None:
        while True:
            start, first, end = await self._find_start(tp)
            reader = PartitionReader(
                tp,
                start,
                self._handler,
                self._commits.add,
                self._dead_letters,
                self._watch,
                self._options.max_batch_records,
                f"group {self._group}",
            )
            self._watch.assign(tp, start)
            if start < first:
                reader.stop(LOST.format(start, first - 1))
                return
            if start > end:
                reader.stop(SHRUNK.format(end, start))
                return
            self._consumer.seek(tp, start)
            self._readers[tp] = reader
            self._consumer.resume(tp)
            if await reader.run():
                return
            self._consumer.pause(tp)
            self._readers.pop(tp, None)
            await asyncio.sleep(MOVED_POSITION_S)

    def _report_failure(self, tp: KafkaTopicPartition, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._watch.stop(tp, f"its reader failed: {error!r:.200}")
            _log.error("consumer.failed", topic=tp.topic, partition=tp.partition, exc_info=error)

    async def _find_start(self, tp: KafkaTopicPartition) -> tuple[int, int, int]:
        """The offset to start at, the first offset in the log, and the end of the log; retried without limit."""

        async def attempt() -> tuple[int, int, int]:
            try:
                stored = await self._load_positions([tp]) if self._load_positions else {}
                first = (await self._consumer.beginning_offsets([tp]))[tp]
                end = (await self._consumer.end_offsets([tp]))[tp]
                committed = None if tp in stored else await self._consumer.committed(tp)
                return stored.get(tp, first if committed is None else committed), first, end
            except Exception as error:
                self._watch.note_problem(tp, f"its position cannot be read: {error!r:.200}")
                raise

        return await retry_forever(Exception, *START_RETRY_S)(attempt)

    async def _enqueue(self, tp: KafkaTopicPartition, reader: PartitionReader, records: Sequence[StoredRecord]) -> None:
        if reader.is_finishing:
            return
        offset = records[0].position.offset
        if offset == reader.expected_offset:
            reader.enqueue(records)
            return
        # a gap (aborted records); or the log no longer has the expected offset, and the consumer went to its start
        try:
            first = (await self._consumer.beginning_offsets([tp]))[tp]
        except KafkaError as error:
            _log.warning("consumer.fetch_retried", topic=tp.topic, partition=tp.partition, error=repr(error))
            if self._readers.get(tp) is reader:
                self._consumer.seek(tp, offset)
            return
        if first > reader.expected_offset:
            reader.stop(LOST.format(reader.expected_offset, first - 1))
        elif offset < reader.expected_offset:
            reader.stop(WENT_BACK.format(offset, reader.expected_offset))
        else:
            reader.enqueue(records)

    async def _finish(self, partitions: Sequence[TopicPartition]) -> None:
        """Finish the batches in progress and commit; another member may read the partitions after this returns."""
        self._unassigned_since = time.monotonic()
        for tp in partitions:
            if tp in self._readers:
                self._readers.pop(tp).finish()
            elif tp in self._tasks:
                self._tasks[tp].cancel()
        tasks = [self._tasks.pop(tp) for tp in partitions if tp in self._tasks]
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=self._options.finish_s)
            for task in late:
                task.cancel()  # the handler's transaction rolls back; nothing was committed
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._commits.revoke(partitions)
        for tp in partitions:
            self._watch.revoke(tp)

    # -- backpressure and health ------------------------------------------------------------

    def _pause_and_resume(self) -> None:
        paused = self._consumer.paused()
        for tp, reader in self._readers.items():
            if (reader.is_full or reader.is_finishing) and tp not in paused:
                self._consumer.pause(tp)
            elif reader.has_room and not reader.is_finishing and tp in paused:
                self._consumer.resume(tp)

    def _end_of(self, tp: TopicPartition) -> int | None:
        """The end of a partition's log; None where the broker has not reported it for a while."""
        reported_ms = self._consumer.last_poll_timestamp(tp)
        is_old = reported_ms is None or time.time() - reported_ms / 1000 > END_MAX_AGE_S
        end: int | None = self._consumer.highwater(tp)
        return None if is_old and tp not in self._consumer.paused() else end

    async def _keep_watching(self) -> None:
        reporter = StallReporter("consumer", group=self._group)
        while True:
            await asyncio.sleep(STALL_CHECK_S)
            reporter.report(self.stalls())


OnPartitions = Callable[[Sequence[KafkaTopicPartition]], Awaitable[None]]


class _Listener(ConsumerRebalanceListener):
    """Forwards aiokafka's callbacks. A separate class, because mypy does not check a class whose base is untyped."""

    def __init__(self, revoke: OnPartitions, assign: OnPartitions) -> None:
        self._revoke, self._assign = revoke, assign

    async def on_partitions_revoked(self, revoked: Sequence[KafkaTopicPartition]) -> None:
        await self._revoke(revoked)

    async def on_partitions_assigned(self, assigned: Sequence[KafkaTopicPartition]) -> None:
        await self._assign(assigned)
