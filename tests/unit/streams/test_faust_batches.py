"""What the batch consumer hands on, and when it refuses to: with a client that says what the test wants."""

from collections import deque
from types import SimpleNamespace
from typing import Any

from faust.types import TP

from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position
from esper.streams.worker import faust_batches
from esper.streams.worker.faust_batches import BatchConsumer

PLACE = TP("system.runs", 3)


class Client(BatchConsumer):
    """A consumer without Kafka. ``fetched`` is what the broker gives next, as offsets; ``stored`` where Postgres is."""

    should_stop = False

    def __init__(self, fetched: list[int], stored: int = 5) -> None:
        self.flow_active = True
        self.stored, self.fetched, self.num_seeks = stored, fetched, 0
        self.asked: list[tuple[int, int]] = []
        self.may_deliver, self.fails = True, False
        self._next_start, self._in_flight = {}, {}
        self._acked_index = {PLACE: set()}
        self._acked = {PLACE: []}
        monitor = SimpleNamespace(track_tp_end_offset=lambda _tp, _offset: None)
        self.app: Any = SimpleNamespace(consumer_generation_id=1, monitor=monitor, may_deliver=self._answer)

    async def _answer(self, _tp: TP, start: int, fetched: int) -> bool:
        self.asked.append((start, fetched))
        return self.may_deliver

    async def _wait_next_records(self, timeout: float) -> Any:
        return {PLACE: [SimpleNamespace(offset=n) for n in self.fetched]}, {PLACE}

    def _to_message(self, tp: TP, record: Any) -> Any:
        return SimpleNamespace(tp=tp, offset=record.offset, value=None)

    def highwater(self, tp: TP) -> int:
        return 100

    async def perform_seek(self) -> None:
        self.num_seeks += 1
        if self.fails:
            raise OSError("the broker is away")
        self._next_start = {PLACE: self.stored}

    async def batches(self) -> list[Any]:
        return [message.value async for _tp, message in self.getmany(1.0)]


def to_stored_record(record: Any) -> StoredRecord:
    return StoredRecord(Position(PLACE.topic, PLACE.partition, record.offset), b"", b"", (), 0)


async def test_nothing_is_handed_on_before_the_position_is_known(monkeypatch: Any) -> None:
    """A seek that Faust gave up would let the client go on from Kafka's committed offset."""
    monkeypatch.setattr(faust_batches, "to_stored_record", to_stored_record)
    client = Client([7, 8])
    client.fails = True
    assert await client.batches() == []
    assert await client.batches() == []
    client.fails = False
    assert await client.batches() == []
    assert client.num_seeks == 3
    client.fetched = [5, 6]
    (batch,) = await client.batches()
    assert (batch.start, batch.end) == (5, 7)


async def test_batches_carry_where_they_start_and_the_app_is_asked_about_each(monkeypatch: Any) -> None:
    monkeypatch.setattr(faust_batches, "to_stored_record", to_stored_record)
    client = Client([5, 6])
    await client.perform_seek()
    (first,) = await client.batches()
    client.fetched = [9, 12]  # expired records in between are no gap
    (second,) = await client.batches()
    assert [(b.start, b.end) for b in (first, second)] == [(5, 7), (7, 13)]
    assert client.asked == [(5, 5), (7, 9)]
    client.may_deliver = False
    assert await client.batches() == []


async def test_a_batch_is_committed_once_it_and_all_before_it_are_acked() -> None:
    client = Client([])
    client._in_flight = {PLACE: deque([6, 12, 20])}
    client._acked_index[PLACE] |= {12}
    assert client._new_offset(PLACE) is None
    client._acked_index[PLACE] |= {6}
    assert client._new_offset(PLACE) == 13
    assert client._new_offset(PLACE) is None
    assert list(client._in_flight[PLACE]) == [20]
