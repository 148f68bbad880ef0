"""The records that live workers skipped, by their dead letters: a replay skips exactly these.

Invariant: refreshed after the end of a replayed range is known. A dead letter stays in Postgres until Kafka has it
(``esper.streams.dead_letters``), so Postgres is read first.
"""

from esper.errors import DecodeError
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position, TopicPartition
from esper.schemas.topics import TOPICS
from esper.streams.database.connection_types import Connection
from esper.streams.dead_letters import Undecodable, pending_dead_letters, projection_dead_letter, record_dead_letters
from esper.streams.replay.replay_log_reader import LogReader, Offsets


class SkippedRecords:
    """The skipped records by position, as of the last ``refresh``.

    Args:
        first: the oldest offset of each partition at the start of the replay.
    """

    def __init__(self, reader: LogReader, first: Offsets) -> None:
        self.errors: dict[Position, DecodeError] = {}
        self._expired: list[Undecodable] = []
        self._reader = reader
        self._first = first
        self._next: dict[TopicPartition, int] = {}

    async def refresh(self, live: Connection) -> None:
        """Read the dead letters that were written since the last call.

        Args:
            live: sees the live projections as they are now, not an older snapshot.
        """
        for record in await pending_dead_letters(live):
            self._add(record)
        ends = await self._reader.end_offsets()
        partitions = [tp for topic in TOPICS for tp in topic.dead_letters.partitions]
        starts = {tp: self._next.get(tp, self._first[tp]) for tp in partitions}
        async for batch in self._reader.read(starts, {tp: ends[tp] for tp in partitions}):
            for record in batch.records:
                self._add(record)
        self._next = {tp: ends[tp] for tp in partitions}

    async def record_expired(self, connection: Connection) -> None:
        """Record the dead letters whose records have expired, since no replay reads those. A redrive needs them."""
        await record_dead_letters(connection, self._expired, to_be_sent=False)
        self._expired.clear()

    def _add(self, record: StoredRecord) -> None:
        letter = projection_dead_letter(record)
        if letter is None or letter.origin in self.errors:
            return
        error = self.errors[letter.origin] = DecodeError(letter.reason, letter.detail)
        if letter.origin.offset < self._first[letter.origin.topic, letter.origin.partition]:
            self._expired.append((letter.record, error))
