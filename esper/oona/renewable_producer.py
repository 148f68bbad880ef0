"""A lane: one aiokafka producer, replaced when it broke, and the batches that go through it.

Owns order and the bound. Invariant: records of one call reach their partition in the order given,
resends apart: an idempotent producer numbers its batches, so that none is taken after one that was
lost, and a producer that lost one is never used again.

Bound: a lane holds two batches (one waiting, one under way) of ``BATCH_BYTES`` for each partition
that is written to. Who has more to write waits, with one more batch of its own for each partition.
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
from esper.errors import ContractError, EsperError, InvariantError, UnavailableError
from esper.logging import get_logger
from esper.oona.client_options import client_options, kafka_error, started
from esper.oona.deliveries import Deliveries
from esper.oona.records import RECORD_LIMIT_BYTES, Record, TopicPartition, partition_for
from esper.schemas.topics import DEAD_LETTER_SUFFIX

LETTER_VALUE_BYTES = RECORD_LIMIT_BYTES + 65_536  # other clients write values as large as their topic takes
BATCH_BYTES = 512 * 1024
FEW_RECORDS = 3  # up to here records share batches with those of other callers
SETTLE_S = 5.0  # what is under way at the end gets this long; then it is given up
GIVE_UP_S = 2.0  # for a broken producer's own tasks to end, once its connections are closed
METADATA_S = 3.0  # for a broker to say how many partitions a topic has
REQUEST_TIMEOUT_MS = 10_000  # a request that a broker did not answer by then is sent again

_log = get_logger(__name__)


class RenewableProducer:
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
        self._turns: defaultdict[TopicPartition, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._producer: Any = None
        self._renewal: asyncio.Task[Any] | None = None
        self._is_closed = False

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
        """Let what is under way arrive, for ``SETTLE_S``, and end for good."""
        self._is_closed = True
        if self._renewal is not None:
            await asyncio.wait([self._renewal], timeout=SETTLE_S)
            self._renewal.cancel()
            await asyncio.wait([self._renewal])
        producer, self._producer = self._producer, None
        try:
            if producer is not None:
                async with asyncio.timeout(SETTLE_S):
                    await producer.flush()
        except TimeoutError:
            await _give_up(producer)
        finally:
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

    async def _send_group(
        self, producer: Any, place: TopicPartition, numbers: list[int], deliveries: Deliveries
    ) -> bool:
        """Send one partition's records. From the first batch that fails none counts as sent.

        Returns:
            False where the producer lost a batch and must not be used again.
        """
        raised: EsperError | None = None
        is_sound = True
        under_way: list[tuple[list[int], Any]] = []
        try:
            if len(numbers) <= FEW_RECORDS and all(deliveries.records[n].key is not None for n in numbers):
                await self._submit_few(producer, place, numbers, deliveries.records, under_way)
            else:
                async with self._turns[place]:  # who waits for room waits in line, not in a crowd
                    await self._submit_batches(producer, place, numbers, deliveries.records, under_way)
        except (KafkaError, OSError) as error:
            raised = self._explained(error)
            is_sound = isinstance(error, KafkaTimeoutError)  # there was no room yet: nothing is lost
        if under_way:
            await asyncio.wait([future for _members, future in under_way])
        num_arrived = 0
        for members, future in under_way:
            if future.exception() is not None:
                _note_failed(deliveries, numbers[num_arrived:], members, self._explained(future.exception()))
                return False
            deliveries.arrived(members, place[1], future.result().offset)
            num_arrived += len(members)
        if raised is not None:
            _note_failed(deliveries, numbers[num_arrived:], numbers[num_arrived : num_arrived + 1], raised)
        return is_sound

    async def _submit_few(
        self, producer: Any, place: TopicPartition, numbers: list[int], records: Sequence[Record], under_way: list[Any]
    ) -> None:
        """Hand records over one by one: they share batches with those of other callers."""
        for number in numbers:
            topic, key, value, headers, timestamp_ms, _partition = records[number]
            future = await producer.send(
                topic, value, key=key, partition=place[1], timestamp_ms=timestamp_ms, headers=list(headers)
            )
            under_way.append(([number], _noted(future)))

    async def _submit_batches(
        self, producer: Any, place: TopicPartition, numbers: list[int], records: Sequence[Record], under_way: list[Any]
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
        return kafka_error(error, self._kafka)

    async def _retire(self, broken: Any) -> None:
        """Put a new producer in the place of one that lost a batch."""
        with contextlib.suppress(EsperError):  # the next attempt tries again, and says so
            await self._renewed(broken)

    async def _renewed(self, broken: Any) -> Any:
        """The producer in the place of ``broken``; a caller that gives up does not break the renewal off."""
        if not self._is_closed and self._producer is broken and (self._renewal is None or self._renewal.done()):
            self._producer = None
            self._renewal = asyncio.create_task(self._renew(broken), name="renew-producer")
            self._renewal.add_done_callback(_seen)
        renewal = self._renewal  # this one: by the time that it fails, another caller may have begun the next
        if renewal is not None:
            await asyncio.wait([renewal])
        if self._is_closed or renewal is None:
            raise InvariantError("the producer is closed: nothing can be sent any more")
        return renewal.result()

    async def _renew(self, broken: Any) -> Any:
        if broken is not None:
            await _give_up(broken)
            await self._exits.aclose()
        await self.open()
        _log.info("producer.renewed", **self._options)
        return self._producer


def _note_failed(deliveries: Deliveries, numbers: Sequence[int], culprits: Sequence[int], error: EsperError) -> None:
    """Note a failure; what a broker refuses for what is in it is refused alone, the others go again."""
    deliveries.failed(culprits, error)
    if isinstance(error, ContractError):
        error = UnavailableError("not sent: a record before it was refused")
    refused = frozenset(culprits)
    deliveries.failed([n for n in numbers if n not in refused], error)


async def _grouped(producer: Any, deliveries: Deliveries, numbers: Iterable[int]) -> dict[TopicPartition, list[int]]:
    """The records of each partition, in order; those that no broker would take are noted as failed."""
    counts: dict[str, int] = {}
    groups: dict[TopicPartition, list[int]] = {}
    records = deliveries.records
    for number in numbers:
        topic, key, value, _headers, _time, partition = records[number]
        limit = LETTER_VALUE_BYTES if topic.endswith(DEAD_LETTER_SUFFIX) else RECORD_LIMIT_BYTES
        if value is not None and len(value) > limit:
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
    future.add_done_callback(_seen)
    return future


def _seen(future: Any) -> None:
    if future.done() and not future.cancelled():
        future.exception()


async def _give_up(producer: Any) -> None:
    """End a producer that cannot deliver. aiokafka would wait for ever, so its batches are told to fail."""
    accumulator, sender = producer._message_accumulator, producer._sender.sender_task
    accumulator.reenqueue = _forget
    sender.cancel()
    accumulator.fail_all(ProducerClosed())
    for batch in (*accumulator._pending_batches, *(b for waiting in accumulator._batches.values() for b in waiting)):
        _seen(batch.future)
        _seen(batch._drain_waiter)
    await producer.client.close()  # what is under way ends now, not at its request's timeout
    await asyncio.wait([sender], timeout=GIVE_UP_S)
    if sender.done():
        await producer.stop()
    else:
        producer._closed = True
        _log.warning("producer.abandoned", reason="it did not stop in time; its connections are closed")


def _forget(_batch: Any) -> None:
    """Where aiokafka would try a batch again: it has failed already."""
