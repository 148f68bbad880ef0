"""A lane: one aiokafka producer, replaced when it broke, and the batches that go through it.

Owns order and the bound. Invariant: records of one call reach their partition in the order given,
resends apart: an idempotent producer numbers its batches, so that none is taken after one that was
lost, and a producer that lost one is never used again.

Bound: a lane holds two batches (one waiting, one under way) of ``BATCH_BYTES`` for each partition
that is written to; who has more to write waits.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError, ProducerClosed

from esper.config import KafkaSettings
from esper.errors import ContractError, EsperError
from esper.logging import get_logger
from esper.oona.clients import client_options, kafka_error, started
from esper.oona.deliveries import Deliveries
from esper.oona.records import RECORD_LIMIT_BYTES, Record, partition_for

BATCH_BYTES = 512 * 1024
FEW_RECORDS = 3  # up to here records share batches with those of other callers
SETTLE_S = 5.0  # what is under way at the end gets this long; then it is given up
GIVE_UP_S = 2.0  # for a broken producer's own tasks to end, once its connections are closed
METADATA_S = 3.0  # for a broker to say how many partitions a topic has
REQUEST_TIMEOUT_MS = 10_000  # a request that a broker did not answer by then is sent again

_log = get_logger(__name__)

Place = tuple[str, int]
"""(topic, partition)."""


class Lane:
    """Async: ``open``, ``attempt`` as often as needed, ``close``.

    Args:
        linger_ms: how long a record that comes alone may wait for company.
        compression: of batches, by aiokafka's name for it; None for none.
    """

    def __init__(
        self, kafka: KafkaSettings, client_id: str, *, linger_ms: int = 0, compression: str | None = None
    ) -> None:
        self._kafka = kafka
        self._options = {"client_id": client_id, "linger_ms": linger_ms, "compression_type": compression}
        self._exits = AsyncExitStack()
        self._renewing = asyncio.Lock()
        self._turns: defaultdict[Place, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._producer: Any = None

    async def open(self) -> None:
        """Connect.

        Raises:
            UnavailableError: no broker answers.
        """
        producer = AIOKafkaProducer(
            **client_options(self._kafka),
            **self._options,
            acks="all",
            enable_idempotence=True,
            max_batch_size=BATCH_BYTES,
            max_request_size=RECORD_LIMIT_BYTES + BATCH_BYTES,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        async with AsyncExitStack() as exits:
            await exits.enter_async_context(started(producer, self._kafka))
            self._exits, self._producer = exits.pop_all(), producer

    async def close(self) -> None:
        """Let what is under way arrive, for ``SETTLE_S``, and end."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            async with asyncio.timeout(SETTLE_S):
                await producer.flush()
        except TimeoutError:
            await _give_up(producer)
        await self._exits.aclose()

    async def attempt(self, deliveries: Deliveries, numbers: Sequence[int]) -> None:
        """Send these records once, and note what became of each. Raises nothing of Kafka's."""
        producer = self._producer
        try:
            if producer is None:
                producer = await self._renewed(None)
            groups = await _grouped(producer, deliveries, numbers)
            sends = [self._send_group(producer, *group, deliveries) for group in groups.items()]
            is_sound = await sends[0] if len(sends) == 1 else all(await asyncio.gather(*sends))
        except (KafkaError, OSError, EsperError) as error:
            deliveries.failed(numbers, self._explained(error))
            is_sound = False
        if not is_sound and producer is not None:
            await self._retire(producer)

    async def _send_group(self, producer: Any, place: Place, numbers: list[int], deliveries: Deliveries) -> bool:
        """Send one partition's records; from the first that fails on, all count as failed.

        Returns:
            False where the producer lost a batch and must not be used again.
        """
        error: EsperError | None = None
        under_way: list[tuple[list[int], Any]] = []
        try:
            if len(numbers) <= FEW_RECORDS and all(deliveries.records[n].key is not None for n in numbers):
                await self._submit_few(producer, place, numbers, deliveries.records, under_way)
            else:
                async with self._turns[place]:  # who waits for room waits in line, not in a crowd
                    await self._submit_batches(producer, place, numbers, deliveries.records, under_way)
        except (KafkaError, OSError) as raised:
            error = self._explained(raised)
        is_sound = error is None or isinstance(error.__cause__, KafkaTimeoutError)  # that is: no room yet
        if under_way:
            await asyncio.wait([future for _members, future in under_way])
        for members, future in under_way:
            if future.exception() is not None:
                is_sound = False
                error = error or self._explained(future.exception())
            if error is None or not future.exception():
                deliveries.arrived(members, place[1], future.result().offset)
        if error is not None:
            deliveries.failed(numbers, error)
        return is_sound

    async def _submit_few(
        self, producer: Any, place: Place, numbers: list[int], records: Sequence[Record], under_way: list[Any]
    ) -> None:
        """Hand records over one by one: they share batches with those of other callers."""
        for number in numbers:
            topic, key, value, headers, timestamp_ms, _partition = records[number]
            future = await producer.send(
                topic, value, key=key, partition=place[1], timestamp_ms=timestamp_ms, headers=list(headers)
            )
            under_way.append(([number], _noted(future)))

    async def _submit_batches(
        self, producer: Any, place: Place, numbers: list[int], records: Sequence[Record], under_way: list[Any]
    ) -> None:
        """Hand records over in batches of their own, which costs a tenth for each."""
        builder, members = producer.create_batch(), list[int]()

        async def submit() -> None:
            builder.close()
            future = await producer.send_batch(builder, place[0], partition=place[1])
            under_way.append((members, _noted(future)))

        for number in numbers:
            _topic, key, value, headers, timestamp_ms, _partition = records[number]
            fields = {"timestamp": timestamp_ms, "key": key, "value": value, "headers": list(headers)}
            if builder.append(**fields) is None:
                await submit()
                builder, members = producer.create_batch(), []
                builder.append(**fields)
            members.append(number)
        if members:
            await submit()

    def _explained(self, error: BaseException) -> EsperError:
        if isinstance(error, EsperError):
            return error
        explained = kafka_error(error, self._kafka)
        explained.__cause__ = error
        return explained

    async def _retire(self, broken: Any) -> None:
        """Put a new producer in the place of one that lost a batch."""
        with contextlib.suppress(EsperError):  # the next attempt tries again, and says so
            await self._renewed(broken)

    async def _renewed(self, broken: Any) -> Any:
        async with self._renewing:
            if self._producer is broken:
                self._producer = None
                if broken is not None:
                    await _give_up(broken)
                    await self._exits.aclose()
                await self.open()
            return self._producer


async def _grouped(producer: Any, deliveries: Deliveries, numbers: Iterable[int]) -> dict[Place, list[int]]:
    """The records of each partition, in order; those that no broker would take are noted as failed."""
    counts: dict[str, int] = {}
    groups: dict[Place, list[int]] = {}
    records = deliveries.records
    for number in numbers:
        topic, key, value, _headers, _time, partition = records[number]
        if value is not None and len(value) > RECORD_LIMIT_BYTES:
            deliveries.failed([number], _too_large(topic, len(value)))
            continue
        if partition is None:
            if topic not in counts:
                async with asyncio.timeout(METADATA_S):
                    counts[topic] = len(await producer.partitions_for(topic))
            partition = partition_for(key or b"", counts[topic])
        place = (topic, partition)
        if place in groups:
            groups[place].append(number)
        else:
            groups[place] = [number]
    return groups


def _too_large(topic: str, num_bytes: int) -> ContractError:
    return ContractError(f"a record of {num_bytes:,} bytes for {topic} is over the limit of {RECORD_LIMIT_BYTES:,}")


def _noted(future: Any) -> Any:
    """The future, which asyncio will not report as overlooked where nobody waits for it any more."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


async def _give_up(producer: Any) -> None:
    """End a producer that cannot deliver. aiokafka would wait for ever, so its batches are told to fail."""
    accumulator, sender = producer._message_accumulator, producer._sender.sender_task
    accumulator.reenqueue = _forget
    sender.cancel()
    accumulator.fail_all(ProducerClosed())
    await producer.client.close()  # what is under way ends now, not at its request's timeout
    await asyncio.wait([sender], timeout=GIVE_UP_S)
    if sender.done():
        await producer.stop()
    else:
        producer._closed = True
        _log.warning("producer.abandoned", reason="it did not stop in time; its connections are closed")


def _forget(_batch: Any) -> None:
    """Where aiokafka would try a batch again: it has failed already."""
