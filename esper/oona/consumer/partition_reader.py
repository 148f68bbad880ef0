"""One partition of a subscription: its records in order, one batch at a time, to the handler.

The order is the design:
1. decode a batch; what cannot be decoded is set aside with its reason;
2. the handler gets the rest, with the position that the batch moves to, and returns when its own
   transaction is over;
3. what was set aside goes to the dead letters;
4. the position moves, and is committed a moment later.
A step that fails is tried again, with growing waits, for as long as the partition is ours; until 4 the
batch comes again. A newer version of a known type stops the partition before it.
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

RETRY_S = (0.1, 5.0)  # first and longest wait before a batch that failed is tried again

_log = get_logger(__name__)


class Received(NamedTuple):
    """An event, and where it lies."""

    message: OonaMessage
    position: Position


@dataclass(frozen=True, slots=True)
class ReceivedBatch:
    """Consecutive events of one partition. ``end`` is the offset to go on from once they are handled.

    A handler that stores ``end`` in its own transaction, and gives it back as the subscription's
    ``load_positions``, applies every event exactly once, whoever is killed when. ``start`` is where
    the reader stood: a handler whose stored position differs must refuse the batch.
    """

    topic: str
    partition: int
    start: int
    end: int
    events: tuple[Received, ...]


Handler = Callable[[ReceivedBatch], Awaitable[object]]
SendRecords = Callable[[Sequence[Record]], Awaitable[object]]
Done = Callable[[TopicPartition, int], None]


class PartitionReader:
    """Reads what it is ``offer``ed, in its ``run``, until ``finish``.

    Args:
        start: the offset of the first record that counts.
        max_batch_records: what a handler gets at most; three times as many may wait.
        reader: whom dead letters name.
    """

    def __init__(
        self,
        place: TopicPartition,
        start: int,
        handler: Handler,
        done: Done,
        send: SendRecords | None,
        watch: ProgressWatch,
        max_batch_records: int,
        reader: str,
    ) -> None:
        self.place = place
        self._reader = reader
        self.expected = start  # the offset that the next record offered should have
        self._next = start
        self._handler, self._done, self._send, self._watch = handler, done, send, watch
        self._max_batch_records = max_batch_records
        self._waiting: deque[StoredRecord] = deque()
        self._changed = asyncio.Event()
        self._is_finishing = False

    @property
    def is_finishing(self) -> bool:
        """Whether nothing more will be handled: it was stopped, or is given away."""
        return self._is_finishing

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be fetched for now."""
        return len(self._waiting) >= 3 * self._max_batch_records

    @property
    def has_room(self) -> bool:
        """Whether fetching may go on."""
        return len(self._waiting) < self._max_batch_records

    def offer(self, records: Sequence[StoredRecord]) -> None:
        """Take records that were fetched; what lies before the position is dropped."""
        self._waiting.extend(r for r in records if r.position.offset >= self.expected)
        self.expected = max(self.expected, records[-1].position.offset + 1)
        self._changed.set()

    def finish(self) -> None:
        """Begin no other batch; the one under way is finished."""
        self._is_finishing = True
        self._changed.set()

    def stop(self, reason: str) -> None:
        """Read no further: somebody has to look at it first."""
        self.finish()
        self._watch.stopped(self.place, reason)
        topic, partition = self.place
        _log.error("partition.stopped", topic=topic, partition=partition, offset=self._next, reason=reason)

    async def run(self) -> bool:
        """Handle batches until ``finish``. Raises nothing but cancellation.

        Returns:
            False where somebody else moved the position meanwhile: it has to be read anew.
        """
        while not self._is_finishing:
            if not self._waiting:
                self._changed.clear()
                await self._changed.wait()
                continue
            batch, broken, problem = self._decoded()
            if batch.end > batch.start and not await self._is_done_with(batch, broken):
                return self._is_finishing
            if problem is not None and not self._is_finishing:
                self.stop(str(problem))
        return True

    def _decoded(self) -> tuple[ReceivedBatch, list[tuple[StoredRecord, DecodeError]], ContractError | None]:
        """The next batch, what of it is broken, and what stops the partition behind it."""
        events: list[Received] = []
        broken: list[tuple[StoredRecord, DecodeError]] = []
        end = self._next
        problem: ContractError | None = None
        for record in islice(self._waiting, self._max_batch_records):
            try:
                events.append(Received(record.decode(), record.position))
            except NewerVersionError as error:
                problem = error
                break
            except DecodeError as error:
                if self._send is None:
                    problem = error
                    break
                broken.append((record, error))
            end = record.position.offset + 1
        return ReceivedBatch(*self.place, self._next, end, tuple(events)), broken, problem

    async def _is_done_with(self, batch: ReceivedBatch, broken: Sequence[tuple[StoredRecord, DecodeError]]) -> bool:
        """Take the steps of the design; False where the position was moved or given away before the last."""
        letters = [dead_letter(record, error, self._reader) for record, error in broken]
        if batch.events and not await self._try(lambda: self._handler(batch), "the handler"):
            return False
        if letters and self._send is not None:
            send = self._send
            if not await self._try(lambda: send(letters), "sending dead letters"):
                return False
        self._done(self.place, batch.end)
        self._next = batch.end
        while self._waiting and self._waiting[0].position.offset < batch.end:
            self._waiting.popleft()
        self._watch.reached(self.place, batch.end)
        return True

    async def _try(self, step: Callable[[], Awaitable[object]], name: str) -> bool:
        async for attempt in retry_forever(Exception, *RETRY_S):
            with attempt:
                try:
                    await step()
                    return True
                except ConflictError:
                    return False
                except Exception as error:
                    self._watch.troubled(self.place, f"{name} failed: {error!r:.200}")
                    if self._is_finishing:
                        return False
                    raise
        return False
