"""The records that live workers passed over: a replay skips exactly these, whatever is in them.

Invariant: read after the positions that a fold goes up to. A letter lies in Postgres until it is in Kafka
(esper.streams.dead_letters), so Postgres is asked first.
"""

from esper.errors import DecodeError
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position, TopicPartition
from esper.schemas.topics import TOPICS
from esper.streams.database.connection_types import Connection
from esper.streams.dead_letters import pending_dead_letters, record_dead_letters, skipped_record
from esper.streams.replay.replay_log_reader import LogReader, Offsets


class SkippedRecords:
    """Grows with each ``refresh``, which reads what was added since the last one."""

    def __init__(self, reader: LogReader, first: Offsets) -> None:
        self.known: dict[Position, DecodeError] = {}
        self._expired: list[tuple[StoredRecord, DecodeError]] = []
        self._reader = reader
        self._first = first
        self._next: dict[TopicPartition, int] = {}

    async def refresh(self, live: Connection) -> None:
        """Learn the letters that were written since.

        Args:
            live: a connection that sees the live projections now, not as they were before.
        """
        for stored in await pending_dead_letters(live):
            self._learn(stored)
        ends = await self._reader.end_offsets()
        letters = {place: ends[place] for place in _letter_places()}
        starts = {place: self._next.get(place, self._first[place]) for place in letters}
        async for batch in self._reader.read(starts, letters):
            for record in batch.records:
                self._learn(record)
        self._next.update(letters)

    async def record_expired(self, connection: Connection) -> None:
        """Note the letters whose records the log does not hold any more: no fold will meet them.

        Those that are redriven later are folded by their letters.
        """
        await record_dead_letters(connection, self._expired, to_be_sent=False)

    def _learn(self, stored: StoredRecord) -> None:
        letter = skipped_record(stored)
        if letter is None or letter.origin in self.known:
            return
        error = self.known[letter.origin] = DecodeError(letter.reason, letter.detail)
        if letter.origin.offset < self._first[letter.origin.topic, letter.origin.partition]:
            self._expired.append((letter.record, error))


def _letter_places() -> list[TopicPartition]:
    return [(t.dead_letters.name, n) for t in TOPICS for n in range(t.num_partitions)]
