"""Workers that fold one log in every order and with every crash that a real one could bring about, and the judge.

Nothing here is Faust or Kafka: ``esper.streams.worker.batch_projection.project_batch`` alone, on a real Postgres.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from hypothesis import strategies as st
from support.faults.faulty_connection import Crash, FaultyConnection
from support.faults.random_logs import Log

from esper.config import PostgresSettings
from esper.errors import DecodeError, PositionError
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position, TopicPartition
from esper.streams.database.stored_positions import stored_positions
from esper.streams.worker.batch_projection import Batch, project_batch
from esper.streams.worker.partition_cache import PartitionCache

NUM_WORKERS = 3
NOT_COMPARED = ("cluster", "pending_letters", "_yoyo_log", "_yoyo_migration", "_yoyo_version", "yoyo_lock")
TABLES = """
SELECT c.relname FROM pg_class AS c
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
"""
Rows = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of one worker to fold a batch.

    ``begin`` is where it starts from: where the worker itself stands, the stored position (it was assigned the
    partition anew), or up to three records before or beyond that (a repeat; a stale worker).
    ``crash`` is the statement that fails, None for none; ``is_killed`` takes the connection along.
    ``is_beside`` lets it run at the same time as the attempt after it. ``buggy`` is the chance in ten that the
    worker's program cannot read a record that others can. ``remembers`` lets it use what it remembers of the
    partition, however old that is and whatever crashed since.
    """

    worker: int
    place: int
    begin: str
    shift: int
    num_records: int
    crash: int | None
    is_late: bool
    is_killed: bool
    is_beside: bool
    buggy: int
    remembers: bool


ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        worker=st.integers(0, NUM_WORKERS - 1),
        place=st.sampled_from([0, 0, 0, 1]),
        begin=st.sampled_from(["own", "own", "stored", "stored", "shifted"]),
        shift=st.integers(-3, 3),
        num_records=st.integers(1, 6),
        crash=st.none() | st.integers(0, 14),
        is_late=st.booleans(),
        is_killed=st.sampled_from([False, False, False, True]),
        is_beside=st.sampled_from([False, False, True]),
        buggy=st.sampled_from([0, 0, 0, 3]),
        remembers=st.sampled_from([True, True, True, False]),
    ),
    min_size=3,
    max_size=20,
)


class Workers:
    """Some workers on one database. ``open`` first, ``begin`` before each log, ``close`` at the end."""

    def __init__(self, postgres: PostgresSettings) -> None:
        self._postgres = postgres
        self._connections: list[Any] = []

    async def open(self) -> None:
        """Connect every worker."""
        self._connections = [await connected(self._postgres) for _ in range(NUM_WORKERS)]

    def begin(self, log: Log, first: int) -> None:
        """Another log, which starts at offset ``first``."""
        self._log, self._first = log, first
        self._places = sorted(log)
        self._stands: list[dict[TopicPartition, int]] = [{} for _ in range(NUM_WORKERS)]
        self._caches: dict[tuple[int, TopicPartition], PartitionCache] = {}

    async def close(self) -> None:
        """Leave."""
        for connection in self._connections:
            await connection.close()

    async def attempt_all(self, attempts: Sequence[Attempt]) -> None:
        """One after the other, or two at a time."""
        left = list(attempts)
        while left:
            one = left.pop(0)
            both = [one, left.pop(0)] if one.is_beside and left and left[0].worker != one.worker else [one]
            await asyncio.gather(*(self._attempt(a) for a in both))

    async def finish(self) -> None:
        """What a healthy worker does in the end: everything that is left."""
        for place in self._places:
            stored = await self._stored(0, place)
            await self._fold(0, self._batch(place, stored, len(self._log[place]), 0), None)

    async def _attempt(self, attempt: Attempt) -> None:
        place = self._places[attempt.place % len(self._places)]
        stored = await self._stored(attempt.worker, place)
        starts = {"own": self._stands[attempt.worker].get(place, self._first), "stored": stored}
        start = max(self._first, starts.get(attempt.begin, stored + attempt.shift))
        try:
            await self._fold(attempt.worker, self._batch(place, start, attempt.num_records, attempt.buggy), attempt)
        except Crash:
            self._stands[attempt.worker].clear()
        except PositionError:
            assert start > self._first
            self._stands[attempt.worker].pop(place, None)

    async def _fold(self, worker: int, batch: Batch, attempt: Attempt | None) -> None:
        if not batch.records:
            return
        connection = self._connections[worker]
        kill = connection.terminate if attempt and attempt.is_killed else lambda: None
        crash, is_late = (attempt.crash, attempt.is_late) if attempt else (None, False)
        place = (batch.topic, batch.partition)
        cache = self._caches.setdefault((worker, place), PartitionCache())
        if attempt is None or not attempt.remembers:
            cache.forget()
        faulty = FaultyConnection(connection, crash, is_late=is_late, kill=kill)
        try:
            await project_batch(faulty, batch, cache=cache)
            self._stands[worker][place] = batch.end
        finally:
            if connection.is_closed():
                self._connections[worker] = await connected(self._postgres)

    async def _stored(self, worker: int, place: TopicPartition) -> int:
        return (await stored_positions(self._connections[worker])).get(place, self._first)

    def _batch(self, place: TopicPartition, start: int, num_records: int, buggy: int) -> Batch:
        records = [r for r in self._log[place] if r.position.offset >= start][:num_records]
        misread = [_misread(r) if _is_misread(r, buggy) else r for r in records]
        return Batch(*place, start, tuple(misread), may_begin=start == self._first)


async def replayed(connection: Any, log: Log, first: int, letters: Mapping[Position, DecodeError], cut: int) -> None:
    """Fold everything once, in batches of ``cut`` records, as ``esper projections verify`` does."""
    for place, records in sorted(log.items()):
        start = first
        for n in range(0, len(records), cut):
            batch = Batch(*place, start, tuple(records[n : n + cut]))
            await project_batch(connection, batch, letters)
            start = batch.end


async def connected(postgres: PostgresSettings) -> Any:
    """A connection to the projections; what it commits may be lost by a crash of Postgres, which none does here."""
    settings = {"search_path": postgres.schema_name, "synchronous_commit": "off"}
    return await asyncpg.connect(postgres.dsn.get_secret_value(), server_settings=settings)


async def rows_of(connection: Any) -> Rows:
    """Every table that a replay must give again, each row as text, in order."""
    found = {}
    for (name,) in await connection.fetch(TABLES):
        if name not in NOT_COMPARED:
            rows = await connection.fetch(f'SELECT t::text FROM "{name}" AS t ORDER BY t::text COLLATE "C"')
            found[name] = [row[0] for row in rows]
    return {name: rows for name, rows in found.items() if rows}


async def letters_of(connection: Any) -> dict[Position, DecodeError]:
    """What the workers passed over, as their letters tell it."""
    query = "SELECT d.* FROM dead_letters AS d JOIN pending_letters USING (topic, log_partition, log_offset)"
    return {
        Position(r["topic"], r["log_partition"], r["log_offset"]): DecodeError(r["reason"], r["detail"])
        for r in await connection.fetch(query)
    }


async def emptied(connection: Any) -> None:
    """Forget every row."""
    names = [name for (name,) in await connection.fetch(TABLES) if not name.startswith(("_yoyo", "yoyo"))]
    await connection.execute("".join(f'DELETE FROM "{name}";' for name in names))


def _is_misread(record: StoredRecord, buggy: int) -> bool:
    return random.Random(str(record.position)).randrange(10) < buggy


def _misread(record: StoredRecord) -> StoredRecord:
    return record._replace(value=b"what a program with a bug makes of it")
