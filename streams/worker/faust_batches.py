"""One Faust event per fetched (partition, batch): forty times the stock rate (FAUST figures in docs).

Overrides private methods of faust-streaming 0.15.3, which is why that version is pinned
exactly; tests/contract/test_faust.py fails when they change. Invariants: batches of a
partition reach their agent in order, each with the position it starts at, and the position to
read from comes from Postgres, never from Kafka's committed offset. Where the client was moved by
itself (records expired or vanished under it), the app is asked before anything is handed on.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import faust
from faust.transport.drivers.aiokafka import Consumer, Transport
from faust.types import TP

from esper.logging import get_logger
from esper.oona.log_reader import stored
from esper.streams.worker.batch_projection import Batch

IDLE_POLL_S = 0.05  # how soon a partition is fetched again once its buffer has room

_log = get_logger(__name__)


class BatchSchema(faust.Schema[Any, Any]):
    """Hands the batch on untouched: the folding decodes it."""

    def compile(self, app: Any, **_options: Any) -> Callable[..., Awaitable[Any]]:
        """A decoder that makes an event of a message without looking into it."""
        create_event = app.create_event

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return create_event(None, message.value, headers={}, message=message)

        return decode


class BatchConsumer(Consumer):
    """A Faust consumer whose messages are batches. The app has ``load_positions`` and ``may_deliver``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._next_start: dict[TP, int] = {}
        self._in_flight: dict[TP, deque[int]] = {}

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """One message per partition that had records: value is the ``Batch``, offset its last one."""
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
            if start is None:  # assigned, but the seek was given up half way
                await self._seek_again()
                return
            if not await app.may_deliver(tp, start, fetched[0].offset):
                continue
            batch = Batch(tp.topic, tp.partition, start, tuple(stored(r) for r in fetched))
            self._next_start[tp] = batch.end
            message: Any = self._to_message(tp, fetched[-1])
            message.value = batch
            self._in_flight.setdefault(tp, deque()).append(message.offset)
            self.app.monitor.track_tp_end_offset(tp, self.highwater(found))
            yield tp, message

    def has_in_flight(self, tp: TP) -> bool:
        """Whether something was handed on and not committed since."""
        return bool(self._in_flight.get(tp))

    async def perform_seek(self) -> None:
        """Forget what is in flight and read on from the stored positions."""
        self._in_flight.clear()
        self._acked.clear()
        self._acked_index.clear()
        await super().perform_seek()

    async def _seek_again(self) -> None:
        """Seek; where that fails, the next round tries again, since no start is known."""
        self._next_start.clear()
        try:
            await self.perform_seek()
        except Exception as error:
            _log.warning("seek.failed", error=repr(error))

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Every reposition passes through here: go to where Postgres stands."""
        assigned = {TP(tp.topic, tp.partition) for tp in self.assignment()}
        app: Any = self.app
        positions: Mapping[TP, int] = await app.load_positions(assigned) if assigned else {}
        if positions:
            await self.seek_wait(positions)
        self._next_start = dict(positions)
        return positions

    async def _wait_next_records(self, timeout: float) -> Any:
        if self.flow_active and not self.app.client_only and not self._get_active_partitions():
            await asyncio.sleep(IDLE_POLL_S)  # stock waits a whole second here
            return None, set()
        return await super()._wait_next_records(timeout)

    def _new_offset(self, tp: TP) -> int | None:
        """Commit a batch once it and all before it are acked. For lag tools; nobody starts from it."""
        acked, in_flight = self._acked_index[tp], self._in_flight.get(tp, deque())
        done = None
        while in_flight and in_flight[0] in acked:
            done = in_flight.popleft()
            acked.discard(done)
        self._acked[tp].clear()
        return None if done is None else done + 1

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Offsets between two batches' last ones are not missing: nothing to add."""


class BatchTransport(Transport):
    """The aiokafka transport with the batch consumer."""

    Consumer = BatchConsumer
