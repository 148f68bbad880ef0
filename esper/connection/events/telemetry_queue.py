"""TelemetryQueue: a bounded queue of telemetry in memory, which spills to disk while the broker is away.

The trainer adds records and never waits. Bound: a crash loses at most ``max_queued_telemetry`` records and the batch in
flight; records that do not fit are counted as lost, and a `telemetry lost` event records the number. Order: while the
spill has records, new ones are appended to it.
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

FULL_BATCH = 100  # records; a smaller batch waits for more
LINGER_S = 0.010  # how long a smaller batch waits
MAX_BATCH = 1_000  # records taken from the queue at once
SEND_TIMEOUT_S = 5.0  # a batch that is not acknowledged by then is spilled
SPILL_POLL_S = 0.2  # between attempts to empty the spill

_log = get_logger(__name__)


class TelemetryQueue:
    """Telemetry of one incarnation.

    The training thread calls ``put``, ``count_lost``, ``restore_lost`` and ``take_lost``; the connection thread calls
    the rest.

    Args:
        spill: an outbox on disk, for records that Kafka does not accept in time.

    Attributes:
        num_settled: records that a crash can no longer lose: in Kafka, on disk, or counted as lost. Records settle in
            the order of ``put``.
        num_spilled, num_lost_total, num_gaps_recorded: counters for Prometheus; they only grow.
    """

    def __init__(self, spill: Outbox, options: LinkOptions) -> None:
        self.num_settled = 0
        self.num_spilled = self.num_lost_total = self.num_gaps_recorded = 0
        self._spill = spill
        self._options = options
        self._queue: deque[OonaMessage] = deque()
        self._in_flight: list[Record] = []
        self._is_spilling = True  # until the spill of an earlier process is known to be empty
        self._num_lost = 0
        self._lock = threading.Lock()

    def put(self, message: OonaMessage) -> bool:
        """Queue an event; False if the queue is full, and then the event is counted as lost."""
        if len(self._queue) >= self._options.max_queued_telemetry:
            self.count_lost(1)
            return False
        self._queue.append(message)
        return True

    def count_lost(self, count: int) -> None:
        """Count records as lost."""
        with self._lock:
            self._num_lost += count
            self.num_lost_total += count

    def restore_lost(self, count: int) -> None:
        """Count records again that ``take_lost`` returned and no event recorded."""
        with self._lock:
            self._num_lost += count

    def take_lost(self) -> int:
        """The number of records lost since the last call."""
        with self._lock:
            lost, self._num_lost = self._num_lost, 0
            return lost

    @property
    def num_queued(self) -> int:
        """The number of records in memory."""
        return len(self._queue) + len(self._in_flight)

    @property
    def is_empty(self) -> bool:
        """Whether Kafka has every record."""
        return not (self._queue or self._in_flight or len(self._spill))

    async def keep_sending(self, producer: OonaProducer) -> None:
        """Send queued records, in batches of ``FULL_BATCH`` or more, or after ``LINGER_S``. Runs until cancelled."""
        while True:
            if not self._in_flight:  # else the send was interrupted, and the batch is sent again
                if len(self._queue) < FULL_BATCH:
                    await asyncio.sleep(LINGER_S)
                self._take_batch()
            if self._in_flight:
                await self._send_or_spill(producer)

    async def keep_emptying_spill(self, producer: OonaProducer) -> None:
        """Send the records of the spill. Runs until cancelled."""
        while True:
            waiting = self._spill.oldest(MAX_BATCH)
            if not waiting:
                self._is_spilling = False  # no record can be spilled in between: one thread does both
                await asyncio.sleep(SPILL_POLL_S)
                continue
            deliveries = await producer.deliver([record for _id, record in waiting])
            transient = next((error for error in deliveries.errors if isinstance(error, TRANSIENT_ERRORS)), None)
            if transient is not None:  # send the whole batch again, to keep the order
                _log.warning("telemetry.delayed", spilled=len(self._spill), error=str(transient))
                await asyncio.sleep(SPILL_POLL_S)
                continue
            self._count_refused(deliveries.errors)
            self._spill.remove_up_to(waiting[-1][0])

    def save_rest(self) -> None:
        """Spill every record that Kafka does not have. Call it at the end, when nothing sends any more."""
        self._spill_records(self._in_flight)
        self._settle()
        self._take_batch(len(self._queue))
        self._spill_records(self._in_flight)
        self._settle()

    async def _send_or_spill(self, producer: OonaProducer) -> None:
        batch = self._in_flight
        if not self._is_spilling:
            deliveries = await producer.deliver(batch, timeout_s=SEND_TIMEOUT_S)
            self._count_refused([error for error in deliveries.errors if not isinstance(error, TRANSIENT_ERRORS)])
            batch = [d.record for d in deliveries if isinstance(d.error, TRANSIENT_ERRORS)]
        self._spill_records(batch)
        self._settle()

    def _count_refused(self, errors: Sequence[EsperError]) -> None:
        """Count records that no broker accepts as lost, so that they block nothing."""
        if errors:
            self.count_lost(len(errors))
            _log.error("telemetry.refused", records=len(errors), error=str(errors[0]))

    def _take_batch(self, limit: int = MAX_BATCH) -> None:
        count = min(limit, len(self._queue))
        self._in_flight = [encode(self._queue.popleft()) for _n in range(count)]

    def _settle(self) -> None:
        self.num_settled += len(self._in_flight)
        self._in_flight = []

    def _spill_records(self, batch: Sequence[Record]) -> None:
        if not batch:
            return
        self._is_spilling = True
        num_free = self._options.max_spilled_telemetry - len(self._spill)
        kept = batch[: max(0, num_free)]
        try:
            if kept:
                self._spill.append(kept)
                self.num_spilled += len(kept)
        except (OutboxFullError, ContractError) as error:
            kept = []
            _log.warning("telemetry.spill_failed", error=str(error))
        if len(kept) < len(batch):
            self.count_lost(len(batch) - len(kept))
            _log.warning("telemetry.lost", records=len(batch) - len(kept), spilled=len(self._spill))
