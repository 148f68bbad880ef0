"""Writes events: idempotent, acknowledged by all in-sync replicas, a result for every one.

Two lanes with a connection each, so that a large batch of telemetry never stands in the way of a
command. Delivery is at least once: what was not acknowledged may have arrived all the same, and is
sent again. Readers know a resend by its id and sequence.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.metrics import client_metrics
from esper.oona.cloudevents import encode
from esper.oona.dead_letters.dead_letter import reason_of
from esper.oona.deliveries import Deliveries, Delivery
from esper.oona.records import Position, Record
from esper.oona.renewable_producer import RenewableProducer
from esper.retry import retry_forever
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import DEAD_LETTER_SUFFIX, TELEMETRY

TELEMETRY_LINGER_MS = 10  # how long a health signal that comes alone may wait for company
DELIVERY_TIMEOUT_S = 30.0  # then a send fails, and its owner decides
RETRY_S = (0.1, 2.0)  # first and longest wait before what failed is sent again, with as much jitter
ACKNOWLEDGED = "acknowledged"


class OonaProducer:
    """Async context manager. Control topics go out at once; telemetry lingers and is compressed."""

    def __init__(self, kafka: KafkaSettings, *, client_id: str = "esper") -> None:
        self._control = RenewableProducer(kafka, client_id)
        self._telemetry = RenewableProducer(kafka, client_id, linger_ms=TELEMETRY_LINGER_MS, compression="zstd")
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exits:
            exits.push_async_callback(self._close)
            for lane in (self._control, self._telemetry):
                await lane.open()
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def _close(self) -> None:
        """Both at once, lest a broker that is away is waited for twice."""
        await asyncio.gather(self._control.close(), self._telemetry.close())

    async def send(self, message: OonaMessage) -> Position:
        """Write one event and wait until the broker has it.

        Raises:
            UnavailableError: it was not acknowledged in time.
            ContractError: no broker would take it.
        """
        return (await self.deliver([encode(message)])).positions()[0]

    async def send_batch(self, messages: Sequence[OonaMessage]) -> list[Position]:
        """Write several, in this order within each partition, and wait for all of them.

        Raises:
            UnavailableError, ContractError: as ``send``, for one of them; others may have arrived.
        """
        return (await self.deliver([encode(m) for m in messages])).positions()

    async def send_records(self, records: Sequence[Record]) -> list[Position]:
        """The same for records that are encoded already."""
        return (await self.deliver(records)).positions()

    async def deliver(self, records: Sequence[Record], *, timeout_s: float = DELIVERY_TIMEOUT_S) -> Deliveries:
        """Write records and say of each what became of it.

        What a retry can mend is tried again, with exponential waits and jitter, until ``timeout_s``.
        """
        deliveries, began = Deliveries(records), time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    await self._attempt(deliveries)
                except UnavailableError:
                    await self._try_again(deliveries)
        except TimeoutError:
            last = f": {deliveries.errors[-1]}" if deliveries.errors else ""
            late = UnavailableError(f"Kafka did not acknowledge the events within {timeout_s:g} s{last}")
            deliveries.failed(deliveries.waiting(), late)
        _count(deliveries, time.perf_counter() - began)
        return deliveries

    async def _try_again(self, deliveries: Deliveries) -> None:
        async for attempt in retry_forever(UnavailableError, *RETRY_S):
            with attempt:
                client_metrics.count_send_retry("telemetry" if deliveries.records[0].topic == TELEMETRY.name else "control")
                await self._attempt(deliveries)

    async def _attempt(self, deliveries: Deliveries) -> None:
        waiting = deliveries.waiting()
        telemetry = [n for n in waiting if deliveries.records[n].topic == TELEMETRY.name]
        if len(telemetry) in (0, len(waiting)):
            await (self._telemetry if telemetry else self._control).attempt(deliveries, waiting)
        else:
            others = sorted({*waiting}.difference(telemetry))
            await asyncio.gather(
                self._control.attempt(deliveries, others), self._telemetry.attempt(deliveries, telemetry)
            )
        for error in deliveries.errors:
            if isinstance(error, UnavailableError):
                raise error


def _count(deliveries: Deliveries, seconds: float) -> None:
    """Tell Prometheus of one send; letters by their reason, since somebody has to look at them."""
    if deliveries.errors:
        tally = Counter((d.record.topic, _outcome(d)) for d in deliveries)
    else:
        tally = Counter((record.topic, ACKNOWLEDGED) for record in deliveries.records)
    client_metrics.count_send(tally, seconds)
    if any(topic.endswith(DEAD_LETTER_SUFFIX) for topic, _outcome in tally):
        for record, position, _error in deliveries:
            if position is not None and record.topic.endswith(DEAD_LETTER_SUFFIX):
                client_metrics.count_dead_letter(record.topic.removesuffix(DEAD_LETTER_SUFFIX), reason_of(record))


def _outcome(delivery: Delivery) -> str:
    if delivery.error is None:
        return ACKNOWLEDGED
    # what was not acknowledged may have arrived all the same; what was refused never did
    return "unacknowledged" if isinstance(delivery.error, UnavailableError) else "refused"
