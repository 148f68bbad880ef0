"""Sends events: idempotent, acknowledged by all in-sync replicas, with a result for each record.

Control topics and telemetry have a producer each, so that a large batch of telemetry never delays a command.
Delivery is at least once: a record that was not acknowledged may be in the log all the same, and is sent again.
Readers recognize a resend by its id and sequence number.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Self

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.metrics import client_metrics
from esper.oona.cloudevents import encode
from esper.oona.dead_letters.dead_letter import reason_of
from esper.oona.delivery_results import DeliveryResult, DeliveryResults
from esper.oona.records import Position, Record
from esper.oona.renewable_producer import RenewableProducer
from esper.retry import retry_forever
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import DEAD_LETTER_SUFFIX, TELEMETRY

TELEMETRY_LINGER_MS = 10  # how long a single health signal waits to be batched with others
DELIVERY_TIMEOUT_S = 30.0  # then a send fails, and the caller decides what to do
RETRY_S = (0.1, 2.0)  # first and longest wait before a failed record is sent again
ACKNOWLEDGED = "acknowledged"


class OonaProducer:
    """Sends events to Kafka. Control topics are sent at once; telemetry is batched and compressed.

    An async context manager: entering connects, leaving waits a few seconds for records in flight.

    Args:
        client_id: names this client in the broker's logs and metrics.
    """

    def __init__(self, kafka: KafkaSettings, *, client_id: str = "esper") -> None:
        self._control = RenewableProducer(kafka, client_id)
        self._telemetry = RenewableProducer(kafka, client_id, linger_ms=TELEMETRY_LINGER_MS, compression="zstd")
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exits:
            exits.push_async_callback(self._close)
            for producer in (self._control, self._telemetry):
                await producer.open()
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._exits.aclose()

    async def _close(self) -> None:
        """Close both at once, so that a broker that does not answer costs one timeout."""
        await asyncio.gather(self._control.close(), self._telemetry.close())

    async def send(self, message: OonaMessage) -> Position:
        """Send one event and wait for the acknowledgement.

        Raises:
            UnavailableError: the event was not acknowledged within 30 s; it may be in the log all the same.
            NotAllowedError: this client may not write to the topic.
            ContractError: the event is larger than any broker accepts.
        """
        return (await self.deliver([encode(message)])).positions()[0]

    async def send_batch(self, messages: Sequence[OonaMessage]) -> list[Position]:
        """Send events, in this order within each partition, and wait for all acknowledgements.

        Raises:
            UnavailableError, NotAllowedError, ContractError: as ``send``, for one of them; others may be in the log.
        """
        return (await self.deliver([encode(m) for m in messages])).positions()

    async def send_records(self, records: Sequence[Record]) -> list[Position]:
        """Send records that are encoded already. Raises as ``send_batch``."""
        return (await self.deliver(records)).positions()

    async def deliver(self, records: Sequence[Record], *, timeout_s: float = DELIVERY_TIMEOUT_S) -> DeliveryResults:
        """Send records and return the result of each; a failure is in the results and is not raised.

        Transient failures are retried, with exponential waits and jitter, for ``timeout_s``.
        """
        deliveries, began = DeliveryResults(records), time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                async for attempt in retry_forever(UnavailableError, *RETRY_S):
                    if attempt.retry_state.attempt_number > 1:
                        is_telemetry = records[0].topic == TELEMETRY.name
                        client_metrics.count_send_retry("telemetry" if is_telemetry else "control")
                    with attempt:
                        await self._try_send(deliveries)
        except TimeoutError:
            last = f": {deliveries.errors[-1]}" if deliveries.errors else ""
            late = UnavailableError(f"Kafka did not acknowledge the events within {timeout_s:g} s{last}")
            deliveries.note_failed(deliveries.unsent(), late)
        _count(deliveries, time.perf_counter() - began)
        return deliveries

    async def _try_send(self, deliveries: DeliveryResults) -> None:
        unsent = deliveries.unsent()
        telemetry = [n for n in unsent if deliveries.records[n].topic == TELEMETRY.name]
        if len(telemetry) in (0, len(unsent)):
            await (self._telemetry if telemetry else self._control).try_send(deliveries, unsent)
        else:
            others = sorted({*unsent}.difference(telemetry))
            await asyncio.gather(
                self._control.try_send(deliveries, others), self._telemetry.try_send(deliveries, telemetry)
            )
        for error in deliveries.errors:
            if isinstance(error, UnavailableError):
                raise error


def _count(deliveries: DeliveryResults, seconds: float) -> None:
    """Count one send for Prometheus; dead letters also by reason, because each needs an operator."""
    if deliveries.errors:
        tally = Counter((d.record.topic, _outcome(d)) for d in deliveries)
    else:
        tally = Counter((record.topic, ACKNOWLEDGED) for record in deliveries.records)
    client_metrics.count_send(tally, seconds)
    if any(topic.endswith(DEAD_LETTER_SUFFIX) for topic, _outcome in tally):
        for record, position, _error in deliveries:
            if position is not None and record.topic.endswith(DEAD_LETTER_SUFFIX):
                client_metrics.count_dead_letter(record.topic.removesuffix(DEAD_LETTER_SUFFIX), reason_of(record))


def _outcome(result: DeliveryResult) -> str:
    if result.error is None:
        return ACKNOWLEDGED
    # an unacknowledged record may be in the log all the same; a refused one never is
    return "unacknowledged" if isinstance(result.error, UnavailableError) else "refused"
