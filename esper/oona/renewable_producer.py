"""RenewableProducer: one aiokafka producer that is replaced when it breaks, and the batches it sends.

Owns the order of records and the memory bound; ``OonaProducer`` owns retries. Invariant: the records of one call
reach their partition in the order given, resends apart. An idempotent producer numbers its batches, so the broker
accepts none after a lost one, and a producer that lost a batch is never used again.

Memory: for each partition that is written to, two batches (one waiting, one in flight) of ``BATCH_BYTES``, plus one
for each caller that waits to write more.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaTimeoutError, ProducerClosed

from esper.config import KafkaSettings
from esper.errors import ContractError, EsperError, InvariantError, UnavailableError
from esper.logging import get_logger
from esper.oona.broker_errors import CLIENT_ERRORS, kafka_error
from esper.oona.client_options import client_options, started
from esper.oona.delivery_results import DeliveryResults
from esper.oona.records import RECORD_LIMIT_BYTES, Record, TopicPartition, partition_for
from esper.schemas.topics import DEAD_LETTER_SUFFIX

DEAD_LETTER_VALUE_BYTES = RECORD_LIMIT_BYTES + 65_536  # other clients write values as large as their topic accepts
BATCH_BYTES = 512 * 1024
MAX_SHARED_RECORDS = 3  # up to this many records share batches with those of other callers
FLUSH_TIMEOUT_S = 5.0  # on close, batches in flight get this long; then they are abandoned
TASK_END_TIMEOUT_S = 2.0  # for a broken producer's own tasks to end once its connections are closed
METADATA_TIMEOUT_S = 3.0  # for a broker to return a topic's number of partitions
REQUEST_TIMEOUT_MS = 10_000  # a request that a broker does not answer in this time is sent again

_log = get_logger(__name__)


class RenewableProducer:
    """An idempotent Kafka producer. Call ``open``, then ``try_send`` as often as needed, then ``close``.

    Args:
        linger_ms: how long a single record waits to be batched with others.
        compression: of batches, by aiokafka's name for it; None for none.
    """

    def __init__(
        self, kafka: KafkaSettings, client_id: str, *, linger_ms: int = 0, compression: str | None = None
    ) -> None:
        self._kafka = kafka
        self._options = {"client_id": client_id, "linger_ms": linger_ms, "compression_type": compression}
        self._exits = AsyncExitStack()
        self._batch_locks: defaultdict[TopicPartition, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._producer: Any = None
        self._renewal: asyncio.Task[Any] | None = None
        self._is_closed = False

    async def open(self) -> None:
        """Connect.

        Raises:
            NotAllowedError: the broker refuses this client.
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
        """Wait ``FLUSH_TIMEOUT_S`` for the batches in flight, then disconnect for good."""
        self._is_closed = True
        if self._renewal is not None:
            await asyncio.wait([self._renewal], timeout=FLUSH_TIMEOUT_S)
            self._renewal.cancel()
            await asyncio.wait([self._renewal])
        producer, self._producer = self._producer, None
        try:
            if producer is not None:
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await producer.flush()
        except TimeoutError:
            await _abandon(producer)
        finally:
            await self._exits.aclose()

    async def try_send(self, deliveries: DeliveryResults, indices: Sequence[int]) -> None:
        """Send these records once, and note the result of each. Raises nothing of Kafka's."""
        producer = self._producer
        try:
            if producer is None:
                producer = await self._renewed(None)
            groups = await _group_by_partition(producer, deliveries, indices)
            sends = [self._send_group(producer, tp, group, deliveries) for tp, group in groups.items()]
            is_usable = await sends[0] if len(sends) == 1 else all(await asyncio.gather(*sends))
        except (*CLIENT_ERRORS, EsperError) as error:
            deliveries.note_failed(indices, self._translated(error))
            is_usable = False
        if not is_usable and producer is not None:
            await self._replace(producer)

    async def _send_group(
        self, producer: Any, tp: TopicPartition, indices: list[int], deliveries: DeliveryResults
    ) -> bool:
        """Send one partition's records. From the first batch that fails on, none counts as sent.

        Returns:
            False where the producer lost a batch and must not be used again.
        """
        raised: EsperError | None = None
        is_usable = True
        in_flight: list[tuple[list[int], Any]] = []
        try:
            if len(indices) <= MAX_SHARED_RECORDS and all(deliveries.records[n].key is not None for n in indices):
                await self._submit_records(producer, tp, indices, deliveries.records, in_flight)
            else:
                async with self._batch_locks[tp]:  # callers that wait for buffer space queue up, in order
                    await self._submit_batches(producer, tp, indices, deliveries.records, in_flight)
        except CLIENT_ERRORS as error:
            raised = self._translated(error)
            is_usable = isinstance(error, KafkaTimeoutError)  # no buffer space yet: nothing is lost
        if in_flight:
            await asyncio.wait([future for _members, future in in_flight])
        num_acknowledged = 0
        for members, future in in_flight:
            if future.exception() is not None:
                _note_failed(deliveries, indices[num_acknowledged:], members, self._translated(future.exception()))
                return False
            deliveries.note_acknowledged(members, tp[1], future.result().offset)
            num_acknowledged += len(members)
        if raised is not None:
            remaining = indices[num_acknowledged:]
            _note_failed(deliveries, remaining, remaining[:1], raised)
        return is_usable

    async def _submit_records(
        self, producer: Any, tp: TopicPartition, indices: list[int], records: Sequence[Record], in_flight: list[Any]
    ) -> None:
        """Submit records one by one: they share batches with those of other callers."""
        for index in indices:
            topic, key, value, headers, timestamp_ms, _partition = records[index]
            future = await producer.send(
                topic, value, key=key, partition=tp[1], timestamp_ms=timestamp_ms, headers=list(headers)
            )
            in_flight.append(([index], _with_observed_error(future)))

    async def _submit_batches(
        self, producer: Any, tp: TopicPartition, indices: list[int], records: Sequence[Record], in_flight: list[Any]
    ) -> None:
        """Submit records in batches built here, at a tenth of the cost of ``send`` for each record."""
        builder, members = producer.create_batch(), list[int]()

        async def submit() -> None:
            builder.close()
            future = await producer.send_batch(builder, tp[0], partition=tp[1])
            in_flight.append((members, _with_observed_error(future)))

        for index in indices:
            _topic, key, value, headers, timestamp_ms, _partition = records[index]
            fields = {"timestamp": timestamp_ms, "key": key, "value": value, "headers": list(headers)}
            if builder.append(**fields) is None:
                await submit()
                builder, members = producer.create_batch(), []
                builder.append(**fields)
            members.append(index)
        if members:
            await submit()

    def _translated(self, error: BaseException) -> EsperError:
        return error if isinstance(error, EsperError) else kafka_error(error, self._kafka)

    async def _replace(self, broken: Any) -> None:
        """Replace a producer that lost a batch."""
        with contextlib.suppress(EsperError):  # the next send tries again, and reports the error
            await self._renewed(broken)

    async def _renewed(self, broken: Any) -> Any:
        """The producer that replaces ``broken``; cancelling a caller does not cancel the replacement."""
        if not self._is_closed and self._producer is broken and (self._renewal is None or self._renewal.done()):
            self._producer = None
            self._renewal = asyncio.create_task(self._renew(broken), name="renew-producer")
            self._renewal.add_done_callback(_observe_error)
        renewal = self._renewal  # kept: by the time it fails, another caller may have started the next one
        if renewal is not None:
            await asyncio.wait([renewal])
        if self._is_closed or renewal is None:
            raise InvariantError("the producer is closed: nothing can be sent any more")
        return renewal.result()

    async def _renew(self, broken: Any) -> Any:
        if broken is not None:
            await _abandon(broken)
            await self._exits.aclose()
        await self.open()
        _log.info("producer.renewed", **self._options)
        return self._producer


def _note_failed(
    deliveries: DeliveryResults, indices: Sequence[int], culprits: Sequence[int], error: EsperError
) -> None:
    """Note a failure. A record that the broker refuses for its content is refused alone; the others are resent."""
    deliveries.note_failed(culprits, error)
    if isinstance(error, ContractError):
        error = UnavailableError("not sent: a record before it was refused")
    refused = frozenset(culprits)
    deliveries.note_failed([n for n in indices if n not in refused], error)


async def _group_by_partition(
    producer: Any, deliveries: DeliveryResults, indices: Iterable[int]
) -> dict[TopicPartition, list[int]]:
    """The indices of each partition's records, in order; records that no broker accepts are noted as failed."""
    counts: dict[str, int] = {}
    groups: dict[TopicPartition, list[int]] = {}
    records = deliveries.records
    for index in indices:
        topic, key, value, _headers, _time, partition = records[index]
        limit = DEAD_LETTER_VALUE_BYTES if topic.endswith(DEAD_LETTER_SUFFIX) else RECORD_LIMIT_BYTES
        if value is not None and len(value) > limit:
            deliveries.note_failed([index], _too_large(topic, len(value)))
            continue
        if partition is None:
            if topic not in counts:
                async with asyncio.timeout(METADATA_TIMEOUT_S):
                    counts[topic] = len(await producer.partitions_for(topic))
            partition = partition_for(key or b"", counts[topic])
        tp = (topic, partition)
        if tp in groups:
            groups[tp].append(index)
        else:
            groups[tp] = [index]
    return groups


def _too_large(topic: str, num_bytes: int) -> ContractError:
    return ContractError(f"a record of {num_bytes:,} bytes for {topic} is over the limit of {RECORD_LIMIT_BYTES:,}")


def _with_observed_error(future: Any) -> Any:
    """The future, without asyncio's warning about an error that is never retrieved."""
    future.add_done_callback(_observe_error)
    return future


def _observe_error(future: Any) -> None:
    if future.done() and not future.cancelled():
        future.exception()


async def _abandon(producer: Any) -> None:
    """Stop a producer that cannot deliver. Its batches are failed first: ``stop`` would wait for them without limit.

    Uses private attributes of aiokafka, which tests/contract/test_aiokafka.py pins.
    """
    accumulator, sender = producer._message_accumulator, producer._sender.sender_task
    accumulator.reenqueue = _drop_batch
    sender.cancel()
    accumulator.fail_all(ProducerClosed())
    for batch in (*accumulator._pending_batches, *(b for waiting in accumulator._batches.values() for b in waiting)):
        _observe_error(batch.future)
        _observe_error(batch._drain_waiter)
    await producer.client.close()  # requests in flight end now, not at their timeout
    await asyncio.wait([sender], timeout=TASK_END_TIMEOUT_S)
    if sender.done():
        await producer.stop()
    else:
        producer._closed = True
        _log.warning("producer.abandoned", reason="it did not stop in time; its connections are closed")


def _drop_batch(_batch: Any) -> None:
    """Replaces aiokafka's retry of a batch: the batch has failed already."""
