"""When the batch consumer delivers batches, and when it does not: with a scripted client."""

from collections import deque
from types import SimpleNamespace
from typing import Any

from faust.types import TP

from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position
from esper.streams.worker import faust_batches
from esper.streams.worker.faust_batches import BatchConsumer

PARTITION = TP("system.runs", 3)


class Client(BatchConsumer):
    """A consumer without Kafka. ``fetched``: the offsets that the broker returns next; ``stored``: the stored position."""

    should_stop = False

    def __init__(self, fetched: list[int], stored: int = 5) -> None:
        self.flow_active = True
        self.stored, self.fetched, self.num_seeks = stored, fetched, 0
        self.checked: list[tuple[int, int]] = []
        self.may_deliver, self.fails = True, False
        self._next_start, self._in_flight = {}, {}
        self._acked_index = {PARTITION: set()}
        self._acked = {PARTITION: []}
        monitor = SimpleNamespace(track_tp_end_offset=lambda _tp, _offset: None)
        self.app: Any = SimpleNamespace(consumer_generation_id=1, monitor=monitor, may_deliver=self._answer)

    async def _answer(self, _tp: TP, start: int, fetched: int) -> bool:
        self.checked.append((start, fetched))
        return self.may_deliver

    async def _wait_next_records(self, timeout: float) -> Any:
        return {PARTITION: [SimpleNamespace(offset=n) for n in self.fetched]}, {PARTITION}

    def _to_message(self, tp: TP, record: Any) -> Any:
        return SimpleNamespace(tp=tp, offset=record.offset, value=None)

    def highwater(self, tp: TP) -> int:
        return 100

    async def perform_seek(self) -> None:
        self.num_seeks += 1
        if self.fails:
            raise OSError("the broker is away")
        self._next_start = {PARTITION: self.stored}

    async def batches(self) -> list[Any]:
        return [message.value async for _tp, message in self.getmany(1.0)]


def to_stored_record(record: Any) -> StoredRecord:
    return StoredRecord(Position(PARTITION.topic, PARTITION.partition, record.offset), b"", b"", (), 0)


async def test_consumer_delivers_nothing_before_positions_are_known(monkeypatch: Any) -> None:
    """After an abandoned seek, the client would continue at Kafka's committed offset."""
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


async def test_consumer_batches_have_starts_that_the_app_approves(monkeypatch: Any) -> None:
    monkeypatch.setattr(faust_batches, "to_stored_record", to_stored_record)
    client = Client([5, 6])
    await client.perform_seek()
    (first,) = await client.batches()
    client.fetched = [9, 12]  # expired records in between are no gap
    (second,) = await client.batches()
    assert [(b.start, b.end) for b in (first, second)] == [(5, 7), (7, 13)]
    assert client.checked == [(5, 5), (7, 9)]
    client.may_deliver = False
    assert await client.batches() == []


async def test_consumer_commits_acknowledged_batches_in_order() -> None:
    client = Client([])
    client._in_flight = {PARTITION: deque([6, 12, 20])}
    client._acked_index[PARTITION] |= {12}
    assert client._new_offset(PARTITION) is None
    client._acked_index[PARTITION] |= {6}
    assert client._new_offset(PARTITION) == 13
    assert client._new_offset(PARTITION) is None
    assert list(client._in_flight[PARTITION]) == [20]
