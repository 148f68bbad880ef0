"""Writes events: idempotent, acknowledged by all in-sync replicas, one partitioner (murmur2)."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.clients import client_options, started
from esper.oona.cloudevents import Record, encode
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import TELEMETRY

TELEMETRY_LINGER_MS = 10  # how long a health signal may wait for company
MAX_REQUEST_BYTES = 4 * 1024 * 1024
REQUEST_TIMEOUT_MS = 30_000  # then a send fails, and its owner sends it again


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record is in the log."""

    topic: str
    partition: int
    offset: int


class OonaProducer:
    """Async context manager. Control topics go out at once, telemetry in batches.

    Delivery is at least once: a send that fails may have arrived. Readers know a resend by
    its id and sequence.
    """

    def __init__(self, kafka: KafkaSettings, *, client_id: str = "esper") -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._exits = AsyncExitStack()
        self._control: Any = None
        self._telemetry: Any = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exits:
            self._control = await self._open(exits, linger_ms=0, compression_type=None)
            self._telemetry = await self._open(exits, linger_ms=TELEMETRY_LINGER_MS, compression_type="zstd")
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def send(self, message: OonaMessage) -> Position:
        """Write one event and wait until the broker has it.

        Raises:
            UnavailableError: it was not acknowledged in time.
        """
        return (await self.send_records([encode(message)]))[0]

    async def send_batch(self, messages: Sequence[OonaMessage]) -> list[Position]:
        """Write several, in this order within each partition, and wait for all of them."""
        return await self.send_records([encode(m) for m in messages])

    async def send_records(self, records: Sequence[Record]) -> list[Position]:
        """Write records that are encoded already.

        Raises:
            UnavailableError: one was not acknowledged in time; others may have arrived.
        """
        try:
            sent = [await self._enqueue(record) for record in records]
            done = await asyncio.gather(*sent)
        except (KafkaError, OSError) as error:
            raise UnavailableError(f"Kafka did not take the events: {error!r}") from error
        return [Position(d.topic, d.partition, d.offset) for d in done]

    async def _enqueue(self, record: Record) -> Any:
        producer = self._telemetry if record.topic == TELEMETRY.name else self._control
        return await producer.send(
            record.topic,
            record.value,
            key=record.key,
            timestamp_ms=record.timestamp_ms,
            headers=list(record.headers),
        )

    async def _open(self, exits: AsyncExitStack, **options: Any) -> Any:
        producer = AIOKafkaProducer(
            **client_options(self._kafka),
            client_id=self._client_id,
            acks="all",
            enable_idempotence=True,
            max_request_size=MAX_REQUEST_BYTES,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            **options,
        )
        return await exits.enter_async_context(started(producer, self._kafka))
