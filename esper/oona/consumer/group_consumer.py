"""GroupConsumer: a member of a consumer group that loses nothing, and says so when it does not get on.

Owns fetching, backpressure, rebalances and the end; ``PartitionReader`` owns what happens to a batch.
Invariants: a partition is read by one reader, from the committed position (or the handler's own), and
before it is given away its batch under way is finished or given up, never left running.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import aiokafka
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from esper.config import KafkaSettings
from esper.logging import get_logger
from esper.oona.admin.read_access import verify_group
from esper.oona.client_options import CONNECT_TIMEOUT_S, client_options, kafka_error, started
from esper.oona.consumer.offset_commits import Commits
from esper.oona.consumer.partition_reader import Handler, PartitionReader, SendRecords
from esper.oona.log_reader import StoredRecord, stored
from esper.oona.progress_watch import STALLED_AFTER_S, ProgressWatch, Stall, StallReporter
from esper.oona.records import TopicPartition
from esper.retry import retry_forever
from esper.schemas.topics import TopicSpec

POLL_MS = 200
METADATA_MS = 10_000  # how late a topic that was made anew is noticed; until then its readers have no partitions
WATCH_S = 1.0  # how often a stall is looked for
HEARD_S = 10.0  # an end of the log that is older counts as not known
STOP_S = 5.0  # for leaving the group; a broker that is away must not hold a process up

_log = get_logger(__name__)

ANY_PARTITION = -1
START_RETRY_S = (0.1, 5.0)  # first and longest wait before a position is read again
MOVED_S = 0.5  # before a position that somebody else moved is read anew: a rebalance may be on its way
LOST = "offsets {} to {} expired before they were read and are lost"
SHRUNK = "the log ends at {}, before the position {}: a wiped broker, or the wrong one"
WENT_BACK = "the log gave offset {} where {} was due: it was wiped, and filled anew"

LoadPositions = Callable[[Sequence[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]]


@dataclass(frozen=True, slots=True)
class GroupConsumerOptions:
    """How a subscriber reads.

    ``max_batch_records``: what a handler gets at once; three times as many wait in memory for each
    partition, then its fetching pauses. ``finish_s``: how long a batch under way may take when its
    partition is given away, or at the end. ``stalled_after_s``: how long a partition with records
    left may stand still before the subscriber is unhealthy. ``instance_id``: static membership.
    """

    max_batch_records: int = 500
    finish_s: float = 10.0
    session_timeout_s: float = 10.0
    stalled_after_s: float = STALLED_AFTER_S
    instance_id: str | None = None


class GroupConsumer:
    """Async context manager; ``run`` until ``stop`` or cancellation.

    Args:
        handler: gets each batch; when it returns the batch is committed a moment later, when it raises
            the batch comes again.
        load_positions: where the handler itself keeps its positions: asked for each partition that is assigned.
            Kafka's committed offsets count for partitions that it does not name.
        dead_letters: sends what cannot be decoded; without it such a record stops its partition.
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
        self._readers: dict[aiokafka.TopicPartition, PartitionReader] = {}
        self._tasks: dict[aiokafka.TopicPartition, asyncio.Task[None]] = {}
        self._unassigned_since: float | None = time.monotonic()
        self._commits = Commits(lambda offsets: self._consumer.commit(offsets), group)
        self._is_stopping = asyncio.Event()
        self._exits = AsyncExitStack()
        self._consumer: Any = None

    async def __aenter__(self) -> Self:
        self._consumer = AIOKafkaConsumer(
            **client_options(self._kafka),
            group_id=self._group,
            group_instance_id=self._options.instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(self._options.session_timeout_s * 1000),
            heartbeat_interval_ms=int(self._options.session_timeout_s * 250),
            rebalance_timeout_ms=int(1000 * (self._options.finish_s + self._options.session_timeout_s)),
            fetch_max_wait_ms=100,
            metadata_max_age_ms=METADATA_MS,
        )
        self._consumer.subscribe([t.name for t in self._topics], listener=_Listener(self._revoked, self._assigned))
        joining_s = CONNECT_TIMEOUT_S + self._options.finish_s + self._options.session_timeout_s  # of a whole rebalance
        names = {t.name for t in self._topics}
        await verify_group(self._kafka, self._group)
        await self._exits.enter_async_context(started(self._consumer, self._kafka, joining_s, topics=names))
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._finish(list(self._tasks))
        try:
            async with asyncio.timeout(STOP_S):
                await self._exits.aclose()
        except TimeoutError:
            _log.warning("consumer.leave_timed_out", group=self._group, reason="no broker answers")

    @property
    def is_healthy(self) -> bool:
        """Whether every partition gets on."""
        return not self.stalls()

    def stalls(self) -> list[Stall]:
        """The partitions that do not get on: with offset, lag and the reason."""
        found = self._watch.stalls({(tp.topic, tp.partition): self._end_of(tp) for tp in self._readers})
        waited_s = time.monotonic() - self._unassigned_since if self._unassigned_since is not None else 0.0
        names = ",".join(t.name for t in self._topics)
        if waited_s > self._options.stalled_after_s:
            found.append(Stall(names, ANY_PARTITION, 0, None, waited_s, "the group has assigned nothing"))
        if self._commits.failing_s > self._options.stalled_after_s:
            found.append(Stall(names, ANY_PARTITION, 0, None, self._commits.failing_s, "no position can be committed"))
        return found

    def stop(self) -> None:
        """End ``run``; what is under way is finished first."""
        self._is_stopping.set()

    async def run(self) -> None:
        """Read until ``stop``.

        Raises:
            UnavailableError, NotAllowedError: the broker refuses this reader for good.
        """
        works = {"watch": self._keep_watching, "commit": self._commits.keep_committing}
        beside = [asyncio.create_task(work(), name=f"{name}-{self._group}") for name, work in works.items()]
        try:
            while not self._is_stopping.is_set():
                fetched = await self._consumer.getmany(timeout_ms=POLL_MS)
                meant = {tp: self._readers.get(tp) for tp in fetched}
                for tp, records in fetched.items():
                    reader = self._readers.get(tp)
                    if reader is not None and reader is meant[tp]:  # else it was given away just now, or begun anew
                        await self._offer(tp, reader, [stored(r) for r in records])
                self._balance()
        except KafkaError as error:
            raise kafka_error(error, self._kafka) from error
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    # -- the group's side -------------------------------------------------------------------

    async def _revoked(self, revoked: Sequence[aiokafka.TopicPartition]) -> None:
        """Finish what is under way; after this another member may read on."""
        await self._finish(revoked)

    async def _assigned(self, assigned: Sequence[aiokafka.TopicPartition]) -> None:
        """Begin to read each partition; nothing is waited for here, so that the group can go on."""
        self._unassigned_since = None
        for tp in assigned:
            self._consumer.pause(tp)  # until its reader knows where to start
            place = (tp.topic, tp.partition)
            self._watch.begin(place)
            task = asyncio.create_task(self._read(tp, place), name=f"read-{tp.topic}-{tp.partition}")
            task.add_done_callback(partial(self._look_at_end, place))
            self._tasks[tp] = task
        _log.info("consumer.assigned", group=self._group, partitions=len(assigned))

    async def _read(self, tp: aiokafka.TopicPartition, place: TopicPartition) -> None:
        while True:
            start, first, last = await self._tried_start_of(tp, place)
            reader = PartitionReader(
                place,
                start,
                self._handler,
                self._commits.done,
                self._dead_letters,
                self._watch,
                self._options.max_batch_records,
                f"group {self._group}",
            )
            self._watch.begin(place, start)
            if start < first:
                reader.stop(LOST.format(start, first - 1))
                return
            if start > last:
                reader.stop(SHRUNK.format(last, start))
                return
            self._consumer.seek(tp, start)
            self._readers[tp] = reader
            self._consumer.resume(tp)
            if await reader.run():
                return
            self._consumer.pause(tp)
            self._readers.pop(tp, None)
            await asyncio.sleep(MOVED_S)

    def _look_at_end(self, place: TopicPartition, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._watch.stopped(place, f"its reader broke: {error!r:.200}")
            _log.error("consumer.failed", topic=place[0], partition=place[1], exc_info=error)

    async def _tried_start_of(self, tp: aiokafka.TopicPartition, place: TopicPartition) -> tuple[int, int, int]:
        async for attempt in retry_forever(Exception, *START_RETRY_S):
            with attempt:
                try:
                    return await self._start_of(tp, place)
                except Exception as error:
                    self._watch.troubled(place, f"its position cannot be read: {error!r:.200}")
                    raise
        raise AssertionError("retry_forever ends with a success alone")

    async def _start_of(self, tp: aiokafka.TopicPartition, place: TopicPartition) -> tuple[int, int, int]:
        """Where to start, where the log starts, where it ends."""
        own = await self._load_positions([place]) if self._load_positions else {}
        first = (await self._consumer.beginning_offsets([tp]))[tp]
        last = (await self._consumer.end_offsets([tp]))[tp]
        committed = None if place in own else await self._consumer.committed(tp)
        return own.get(place, first if committed is None else committed), first, last

    async def _offer(
        self, tp: aiokafka.TopicPartition, reader: PartitionReader, records: Sequence[StoredRecord]
    ) -> None:
        if reader.is_finishing:
            return
        if records[0].position.offset == reader.expected:
            reader.offer(records)
            return
        # a hole; or what was due is not in the log, and the consumer went to its start
        try:
            first = (await self._consumer.beginning_offsets([tp]))[tp]
        except KafkaError as error:
            _log.warning("consumer.fetch_retried", topic=tp.topic, partition=tp.partition, error=repr(error))
            if self._readers.get(tp) is reader:
                self._consumer.seek(tp, records[0].position.offset)
            return
        if first > reader.expected:
            reader.stop(LOST.format(reader.expected, first - 1))
        elif records[0].position.offset < reader.expected:
            reader.stop(WENT_BACK.format(records[0].position.offset, reader.expected))
        else:
            reader.offer(records)

    async def _finish(self, partitions: Sequence[aiokafka.TopicPartition]) -> None:
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
                task.cancel()  # its transaction rolls back; nothing was committed
            await asyncio.gather(*tasks, return_exceptions=True)
        places = [(tp.topic, tp.partition) for tp in partitions]
        await self._commits.leave(places)
        for place in places:
            self._watch.end(place)

    # -- backpressure and health ------------------------------------------------------------

    def _balance(self) -> None:
        paused = self._consumer.paused()
        for tp, reader in self._readers.items():
            if (reader.is_full or reader.is_finishing) and tp not in paused:
                self._consumer.pause(tp)
            elif reader.has_room and not reader.is_finishing and tp in paused:
                self._consumer.resume(tp)

    def _end_of(self, tp: aiokafka.TopicPartition) -> int | None:
        heard_ms = self._consumer.last_poll_timestamp(tp)
        is_old = heard_ms is None or time.time() - heard_ms / 1000 > HEARD_S
        end: int | None = self._consumer.highwater(tp)
        return None if is_old and tp not in self._consumer.paused() else end

    async def _keep_watching(self) -> None:
        teller = StallReporter("subscriber", group=self._group)
        while True:
            await asyncio.sleep(WATCH_S)
            teller.tell(self.stalls())


OnPartitions = Callable[[Sequence[aiokafka.TopicPartition]], Awaitable[None]]


class _Listener(ConsumerRebalanceListener):
    """What aiokafka calls; kept apart, because a class with its base is not type-checked."""

    def __init__(self, revoked: OnPartitions, assigned: OnPartitions) -> None:
        self._revoked, self._assigned = revoked, assigned

    async def on_partitions_revoked(self, revoked: Sequence[aiokafka.TopicPartition]) -> None:
        await self._revoked(revoked)

    async def on_partitions_assigned(self, assigned: Sequence[aiokafka.TopicPartition]) -> None:
        await self._assigned(assigned)
