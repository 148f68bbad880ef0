"""Telemetry on its way to Kafka: a bounded queue in memory, and a spill on disk while the broker is away.

The trainer puts records in and never waits. Bound: what dies with the process is at most
``max_queued_telemetry`` records and the one batch that is under way; what does not fit is counted as
lost, and a `telemetry lost` event says so. Order: while anything lies in the spill, what is new goes
behind it.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence

from esper.connection.settings import LinkOptions
from esper.errors import ContractError, EsperError, OutboxFullError
from esper.logging import get_logger
from esper.oona.broker_errors import TRANSIENT_ERRORS
from esper.oona.cloudevents import encode
from esper.oona.outbox.outbox_store import Outbox
from esper.oona.producer import OonaProducer
from esper.oona.records import Record
from esper.schemas.messages import OonaMessage

FULL_BATCH = 100  # records that are sent without waiting for more
LINGER_S = 0.010  # how long fewer than that may wait
MAX_BATCH = 1_000  # records taken from the queue at once
AWAY_AFTER_S = 5.0  # a broker that has not taken a batch by then is away: the spill takes over
RETRY_S = 0.2  # between attempts to empty the spill

_log = get_logger(__name__)


class TelemetryQueue:
    """The trainer's thread calls ``put``, ``lose`` and ``take_lost``; the link's thread the rest.

    ``num_safe`` counts the records that need this process no more: taken by Kafka, or on disk, or
    counted as lost. They become safe in the order in which they were put. ``num_spilled``, ``num_lost_ever`` and
    ``num_gaps_told`` only grow: Prometheus reads them.
    """

    def __init__(self, spill: Outbox, options: LinkOptions) -> None:
        self.num_safe = 0
        self.num_spilled = self.num_lost_ever = self.num_gaps_told = 0
        self._spill = spill
        self._options = options
        self._queue: deque[OonaMessage] = deque()
        self._under_way: list[Record] = []
        self._is_spilling = True  # until the spill of an earlier process is seen to be empty
        self._num_lost = 0
        self._lock = threading.Lock()

    def put(self, message: OonaMessage) -> bool:
        """Queue an event; False where the queue is full, and then it is counted as lost."""
        if len(self._queue) >= self._options.max_queued_telemetry:
            self.lose(1)
            return False
        self._queue.append(message)
        return True

    def lose(self, count: int) -> None:
        """Count records that are gone."""
        with self._lock:
            self._num_lost += count
            self.num_lost_ever += count

    def keep_lost(self, count: int) -> None:
        """Take records back that ``take_lost`` gave and nobody could tell of."""
        with self._lock:
            self._num_lost += count

    def take_lost(self) -> int:
        """How many were lost since the last call."""
        with self._lock:
            lost, self._num_lost = self._num_lost, 0
            return lost

    @property
    def num_queued(self) -> int:
        """Records in memory."""
        return len(self._queue) + len(self._under_way)

    @property
    def is_empty(self) -> bool:
        """Whether Kafka has everything."""
        return not (self._queue or self._under_way or len(self._spill))

    async def keep_sending(self, producer: OonaProducer) -> None:
        """Send what is queued, in batches of ``FULL_BATCH`` or after ``LINGER_S``."""
        while True:
            if not self._under_way:  # else something broke, and they go again
                if len(self._queue) < FULL_BATCH:
                    await asyncio.sleep(LINGER_S)
                self._take()
            if self._under_way:
                await self._send_or_spill(producer)

    async def keep_emptying_spill(self, producer: OonaProducer) -> None:
        """Send what is in the spill, for as long as there is something."""
        while True:
            waiting = self._spill.oldest(MAX_BATCH)
            if not waiting:
                self._is_spilling = False  # nothing can come between: one thread does both
                await asyncio.sleep(RETRY_S)
                continue
            deliveries = await producer.deliver([record for _id, record in waiting])
            away = next((error for error in deliveries.errors if isinstance(error, TRANSIENT_ERRORS)), None)
            if away is not None:  # in this order, or not at all: all of it again
                _log.warning("telemetry.delayed", spilled=len(self._spill), error=str(away))
                await asyncio.sleep(RETRY_S)
                continue
            self._refused(deliveries.errors)
            self._spill.remove_up_to(waiting[-1][0])

    def save_rest(self) -> None:
        """At the end: put on disk what Kafka did not take. Nothing may be sending any more."""
        self._spill_over(self._under_way)
        self._settled()
        self._take(len(self._queue))
        self._spill_over(self._under_way)
        self._settled()

    async def _send_or_spill(self, producer: OonaProducer) -> None:
        batch = self._under_way
        if not self._is_spilling:
            deliveries = await producer.deliver(batch, timeout_s=AWAY_AFTER_S)
            self._refused([error for error in deliveries.errors if not isinstance(error, TRANSIENT_ERRORS)])
            batch = [d.record for d in deliveries if isinstance(d.error, TRANSIENT_ERRORS)]
        self._spill_over(batch)
        self._settled()

    def _refused(self, errors: Sequence[EsperError]) -> None:
        """What no broker takes is lost, and must hold nothing up."""
        if errors:
            self.lose(len(errors))
            _log.error("telemetry.refused", records=len(errors), error=str(errors[0]))

    def _take(self, limit: int = MAX_BATCH) -> None:
        count = min(limit, len(self._queue))
        self._under_way = [encode(self._queue.popleft()) for _n in range(count)]

    def _settled(self) -> None:
        self.num_safe += len(self._under_way)
        self._under_way = []

    def _spill_over(self, batch: Sequence[Record]) -> None:
        if not batch:
            return
        self._is_spilling = True
        room = self._options.max_spilled_telemetry - len(self._spill)
        kept = batch[: max(0, room)]
        try:
            if kept:
                self._spill.append(kept)
                self.num_spilled += len(kept)
        except (OutboxFullError, ContractError) as error:
            kept = []
            _log.warning("telemetry.spill_failed", error=str(error))
        if len(kept) < len(batch):
            self.lose(len(batch) - len(kept))
            _log.warning("telemetry.lost", records=len(batch) - len(kept), spilled=len(self._spill))
