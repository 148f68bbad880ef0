"""Reads one partition: its records in order, one batch at a time, through the handler.

For each batch, in this order:
1. decode the records, and separate those that cannot be decoded;
2. pass the events to the handler, with the batch's end offset; the handler returns when its transaction is over;
3. send the undecodable records to the dead letters;
4. advance the position, which is committed a moment later.
A step that fails is retried, with growing waits, for as long as the partition is assigned. A batch is passed to the
handler again until step 4. A newer version of a known event type stops the partition before that record.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from esper.errors import ConflictError, ContractError, DecodeError, NewerVersionError
from esper.logging import get_logger
from esper.oona.dead_letters.dead_letter import dead_letter
from esper.oona.log_reader import StoredRecord
from esper.oona.progress_watch import ProgressWatch
from esper.oona.records import Position, Record, TopicPartition
from esper.retry import retry_forever
from esper.schemas.messages import OonaMessage

RETRY_S = (0.1, 5.0)  # first and longest wait before a failed step is retried
NUM_BUFFERED_BATCHES = 3  # so many full batches are buffered before fetching pauses

_log = get_logger(__name__)


class ReceivedEvent(NamedTuple):
    """An event and its position in the log. ``message.data`` is the event, ``message.id`` its unique id."""

    message: OonaMessage
    position: Position


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Consecutive events of one partition.

    A handler that stores ``end`` in its own transaction, and returns it from ``load_positions``, applies every event
    exactly once, whatever crashes when.

    Args:
        start: the offset that the consumer was at. A handler whose stored position differs must raise ConflictError.
        end: the offset to continue from once the events are handled.
        events: may be empty where the records could not be decoded: the position still moves.
    """

    topic: str
    partition: int
    start: int
    end: int
    events: tuple[ReceivedEvent, ...]


Handler = Callable[[EventBatch], Awaitable[object]]
SendRecords = Callable[[Sequence[Record]], Awaitable[object]]
OnHandled = Callable[[TopicPartition, int], None]


class PartitionReader:
    """Handles the records that ``enqueue`` adds, in ``run``, until ``finish`` or ``stop``.

    Args:
        start: the offset of the first record to handle.
        on_handled: called with the new position after each batch.
        send_dead_letters: None stops the partition at a record that cannot be decoded.
        max_batch_records: the most records in a batch.
        reader: the reader's name in dead letters.
    """

    def __init__(
        self,
        tp: TopicPartition,
        start: int,
        handler: Handler,
        on_handled: OnHandled,
        send_dead_letters: SendRecords | None,
        watch: ProgressWatch,
        max_batch_records: int,
        reader: str,
    ) -> None:
        self.expected_offset = start  # of the next record to enqueue
        self._tp, self._reader, self._position = tp, reader, start
        self._handler, self._on_handled, self._send_dead_letters = handler, on_handled, send_dead_letters
        self._watch = watch
        self._max_batch_records = max_batch_records
        self._buffer: deque[StoredRecord] = deque()
        self._wake_up = asyncio.Event()
        self._is_finishing = False

    @property
    def is_finishing(self) -> bool:
        """Whether no further batch will be handled: the reader was stopped, or its partition is revoked."""
        return self._is_finishing

    @property
    def is_full(self) -> bool:
        """Whether fetching should pause."""
        return len(self._buffer) >= NUM_BUFFERED_BATCHES * self._max_batch_records

    @property
    def has_room(self) -> bool:
        """Whether paused fetching should resume."""
        return len(self._buffer) < self._max_batch_records

    def enqueue(self, records: Sequence[StoredRecord]) -> None:
        """Add fetched records; those before the expected offset are dropped."""
        self._buffer.extend(r for r in records if r.position.offset >= self.expected_offset)
        self.expected_offset = max(self.expected_offset, records[-1].position.offset + 1)
        self._wake_up.set()

    def finish(self) -> None:
        """End ``run`` after the batch in progress."""
        self._is_finishing = True
        self._wake_up.set()

    def stop(self, reason: str) -> None:
        """Finish, and report the partition as stopped until an operator has resolved the reason."""
        self.finish()
        self._watch.stop(self._tp, reason)
        topic, partition = self._tp
        _log.error("partition.stopped", topic=topic, partition=partition, offset=self._position, reason=reason)

    async def run(self) -> bool:
        """Handle batches until ``finish``. Raises only CancelledError.

        Returns:
            False where the handler raised ConflictError: the position moved elsewhere and must be loaded again.
        """
        while not self._is_finishing:
            if not self._buffer:
                self._wake_up.clear()
                await self._wake_up.wait()
                continue
            batch, undecodable, problem = self._next_batch()
            if batch.end > batch.start and not await self._complete(batch, undecodable):
                return self._is_finishing
            if problem is not None and not self._is_finishing:
                self.stop(str(problem))
        return True

    def _next_batch(self) -> tuple[EventBatch, list[tuple[StoredRecord, DecodeError]], ContractError | None]:
        """The next batch, its undecodable records, and the error that stops the partition after it."""
        events: list[ReceivedEvent] = []
        undecodable: list[tuple[StoredRecord, DecodeError]] = []
        end = self._position
        problem: ContractError | None = None
        for record in islice(self._buffer, self._max_batch_records):
            try:
                events.append(ReceivedEvent(record.decode(), record.position))
            except NewerVersionError as error:
                problem = error
                break
            except DecodeError as error:
                if self._send_dead_letters is None:
                    problem = error
                    break
                undecodable.append((record, error))
            end = record.position.offset + 1
        return EventBatch(*self._tp, self._position, end, tuple(events)), undecodable, problem

    async def _complete(self, batch: EventBatch, undecodable: Sequence[tuple[StoredRecord, DecodeError]]) -> bool:
        """Take steps 2 to 4; False where the position moved elsewhere or the partition was revoked before step 4."""
        dead_letters, send = [dead_letter(r, error, self._reader) for r, error in undecodable], self._send_dead_letters
        if batch.events and not await self._retried(lambda: self._handler(batch), "the handler"):
            return False
        if dead_letters and send and not await self._retried(lambda: send(dead_letters), "sending dead letters"):
            return False
        self._on_handled(self._tp, batch.end)
        self._position = batch.end
        while self._buffer and self._buffer[0].position.offset < batch.end:
            self._buffer.popleft()
        self._watch.advance(self._tp, batch.end)
        return True

    async def _retried(self, step: Callable[[], Awaitable[object]], name: str) -> bool:
        """Take a step until it succeeds; False where the position moved elsewhere or the partition was revoked."""
        async for attempt in retry_forever(Exception, *RETRY_S):
            with attempt:
                try:
                    await step()
                    return True
                except ConflictError:
                    return False
                except Exception as error:
                    self._watch.note_problem(self._tp, f"{name} failed: {error!r:.200}")
                    if self._is_finishing:
                        return False
                    raise
        return False
