"""Faust classes that deliver one event per fetched batch: forty times the rate of one event per record.

Overrides private methods of faust-streaming 0.15.3, so that version is pinned exactly and tests/contract/test_faust.py
fails when they change.

Invariants: batches of a partition reach their agent in order, each with its start position. Reading starts at the
position that Postgres holds, never at Kafka's committed offset. If the client skipped records by itself (they expired
or vanished), the app decides whether the batch may be delivered.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import faust
from faust.transport.drivers.aiokafka import Consumer, Transport
from faust.types import TP

from esper.logging import get_logger
from esper.oona.log_reader import to_stored_record
from esper.streams.worker.batch_projection import Batch

IDLE_POLL_S = 0.05  # delay before a partition whose buffer has space is fetched again

_log = get_logger(__name__)


class BatchSchema(faust.Schema[Any, Any]):
    """Passes batches through; the projection decodes them."""

    def compile(self, app: Any, **_options: Any) -> Callable[..., Awaitable[Any]]:
        """A decoder that wraps a message into an event without decoding its value."""
        create_event = app.create_event

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return create_event(None, message.value, headers={}, message=message)

        return decode


class BatchConsumer(Consumer):
    """A Faust consumer whose messages are batches. The app provides ``load_positions`` and ``may_deliver``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._next_start: dict[TP, int] = {}
        self._in_flight: dict[TP, deque[int]] = {}

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """One message per partition with records; its value is the ``Batch``, its offset that of the last record."""
        records, _active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if not records or self.should_stop:
            return
        if not self.flow_active:
            await self._seek_again()
            return
        app: Any = self.app
        for found, fetched in records.items():
            tp = TP(found.topic, found.partition)
            if not self.flow_active or self.app.consumer_generation_id != generation:
                return  # a rebalance seeks every partition again
            start = self._next_start.get(tp)
            if start is None:  # assigned, but the seek was interrupted
                await self._seek_again()
                return
            if not await app.may_deliver(tp, start, fetched[0].offset):
                continue
            batch = Batch(tp.topic, tp.partition, start, tuple(to_stored_record(r) for r in fetched))
            self._next_start[tp] = batch.end
            message: Any = self._to_message(tp, fetched[-1])
            message.value = batch
            self._in_flight.setdefault(tp, deque()).append(message.offset)
            self.app.monitor.track_tp_end_offset(tp, self.highwater(found))
            yield tp, message

    def has_in_flight(self, tp: TP) -> bool:
        """Whether a batch was delivered and is not acknowledged yet."""
        return bool(self._in_flight.get(tp))

    async def perform_seek(self) -> None:
        """Drop the state of batches in flight and continue from the stored positions."""
        self._in_flight.clear()
        self._acked.clear()
        self._acked_index.clear()
        await super().perform_seek()

    async def _seek_again(self) -> None:
        """Seek to the stored positions; after a failure, the next round retries, since no start is known."""
        self._next_start.clear()
        try:
            await self.perform_seek()
        except Exception as error:
            _log.warning("seek.failed", error=repr(error))

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Seek to the positions in Postgres. Faust calls this for every reposition."""
        assigned = {TP(tp.topic, tp.partition) for tp in self.assignment()}
        app: Any = self.app
        positions: Mapping[TP, int] = await app.load_positions(assigned) if assigned else {}
        if positions:
            await self.seek_wait(positions)
        self._next_start = dict(positions)
        return positions

    async def _wait_next_records(self, timeout: float) -> Any:
        if self.flow_active and not self.app.client_only and not self._get_active_partitions():
            await asyncio.sleep(IDLE_POLL_S)  # Faust waits one second here
            return None, set()
        return await super()._wait_next_records(timeout)

    def _new_offset(self, tp: TP) -> int | None:
        """The offset to commit: after the last acknowledged batch in order. Only lag tools read it."""
        acked, in_flight = self._acked_index[tp], self._in_flight.get(tp, deque())
        done = None
        while in_flight and in_flight[0] in acked:
            done = in_flight.popleft()
            acked.discard(done)
        self._acked[tp].clear()
        return None if done is None else done + 1

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Do nothing: offsets between the last ones of two batches are not missing."""


class BatchTransport(Transport):
    """Faust's aiokafka transport with the batch consumer."""

    Consumer = BatchConsumer
