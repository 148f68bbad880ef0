"""Workers that project one log in random batches, orders and crashes, and the replay that they are compared with.

Calls ``esper.streams.worker.batch_projection.project_batch`` on a real Postgres, without Faust and Kafka.
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
    """One attempt of one worker to project a batch.

    ``start_from`` selects the start: the worker's own position, the stored position (as after an assignment), or up to
    three records before or after it (a repeat, or a stale worker). ``crash`` is the index of the statement that fails,
    None for no crash; ``is_killed`` closes the connection too. ``is_concurrent`` runs it together with the next
    attempt. ``num_misread`` out of ten records cannot be decoded by this worker, although others can. ``keeps_cache``
    lets it use its cache of the partition, however old the cache is.
    """

    worker: int
    partition_index: int
    start_from: str
    shift: int
    num_records: int
    crash: int | None
    is_late: bool
    is_killed: bool
    is_concurrent: bool
    num_misread: int
    keeps_cache: bool


ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        worker=st.integers(0, NUM_WORKERS - 1),
        partition_index=st.sampled_from([0, 0, 0, 1]),
        start_from=st.sampled_from(["own", "own", "stored", "stored", "shifted"]),
        shift=st.integers(-3, 3),
        num_records=st.integers(1, 6),
        crash=st.none() | st.integers(0, 14),
        is_late=st.booleans(),
        is_killed=st.sampled_from([False, False, False, True]),
        is_concurrent=st.sampled_from([False, False, True]),
        num_misread=st.sampled_from([0, 0, 0, 3]),
        keeps_cache=st.sampled_from([True, True, True, False]),
    ),
    min_size=3,
    max_size=20,
)


class Workers:
    """Workers on one database. Call ``open`` first, ``begin`` before each log and ``close`` at the end."""

    def __init__(self, postgres: PostgresSettings) -> None:
        self._postgres = postgres
        self._connections: list[Any] = []

    async def open(self) -> None:
        """Connect every worker."""
        self._connections = [await open_connection(self._postgres) for _ in range(NUM_WORKERS)]

    def begin(self, log: Log, first: int) -> None:
        """Take another log, which starts at offset ``first``."""
        self._log, self._first = log, first
        self._partitions = sorted(log)
        self._own_positions: list[dict[TopicPartition, int]] = [{} for _ in range(NUM_WORKERS)]
        self._caches: dict[tuple[int, TopicPartition], PartitionCache] = {}

    async def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            await connection.close()

    async def attempt_all(self, attempts: Sequence[Attempt]) -> None:
        """Make all attempts, one or two at a time."""
        left = list(attempts)
        while left:
            one = left.pop(0)
            both = [one, left.pop(0)] if one.is_concurrent and left and left[0].worker != one.worker else [one]
            await asyncio.gather(*(self._attempt(a) for a in both))

    async def finish(self) -> None:
        """Project the remaining records without faults."""
        for tp in self._partitions:
            stored = await self._stored(0, tp)
            await self._project(0, self._batch(tp, stored, len(self._log[tp]), 0), None)

    async def _attempt(self, attempt: Attempt) -> None:
        tp = self._partitions[attempt.partition_index % len(self._partitions)]
        stored = await self._stored(attempt.worker, tp)
        starts = {"own": self._own_positions[attempt.worker].get(tp, self._first), "stored": stored}
        start = max(self._first, starts.get(attempt.start_from, stored + attempt.shift))
        try:
            await self._project(
                attempt.worker, self._batch(tp, start, attempt.num_records, attempt.num_misread), attempt
            )
        except Crash:
            self._own_positions[attempt.worker].clear()
        except PositionError:
            assert start > self._first
            self._own_positions[attempt.worker].pop(tp, None)

    async def _project(self, worker: int, batch: Batch, attempt: Attempt | None) -> None:
        if not batch.records:
            return
        connection = self._connections[worker]
        kill = connection.terminate if attempt and attempt.is_killed else lambda: None
        crash, is_late = (attempt.crash, attempt.is_late) if attempt else (None, False)
        tp = (batch.topic, batch.partition)
        cache = self._caches.setdefault((worker, tp), PartitionCache())
        if attempt is None or not attempt.keeps_cache:
            cache.clear()
        faulty = FaultyConnection(connection, crash, is_late=is_late, kill=kill)
        try:
            await project_batch(faulty, batch, cache=cache)
            self._own_positions[worker][tp] = batch.end
        finally:
            if connection.is_closed():
                self._connections[worker] = await open_connection(self._postgres)

    async def _stored(self, worker: int, tp: TopicPartition) -> int:
        return (await stored_positions(self._connections[worker])).get(tp, self._first)

    def _batch(self, tp: TopicPartition, start: int, num_records: int, num_misread: int) -> Batch:
        records = [r for r in self._log[tp] if r.position.offset >= start][:num_records]
        misread = [_misread(r) if _is_misread(r, num_misread) else r for r in records]
        return Batch(*tp, start, tuple(misread), may_begin=start == self._first)


async def replay(connection: Any, log: Log, first: int, dead_letters: Mapping[Position, DecodeError], cut: int) -> None:
    """Project the log once, in batches of ``cut`` records, as ``esper projections verify`` does."""
    for tp, records in sorted(log.items()):
        start = first
        for n in range(0, len(records), cut):
            batch = Batch(*tp, start, tuple(records[n : n + cut]))
            await project_batch(connection, batch, dead_letters)
            start = batch.end


async def open_connection(postgres: PostgresSettings) -> Any:
    """A connection to the projections. Commits are asynchronous: they are lost only if Postgres crashes."""
    settings = {"search_path": postgres.schema_name, "synchronous_commit": "off"}
    return await asyncpg.connect(postgres.dsn.get_secret_value(), server_settings=settings)


async def read_rows(connection: Any) -> Rows:
    """Rows of every table that a replay must reproduce, as sorted texts."""
    found = {}
    for (name,) in await connection.fetch(TABLES):
        if name not in NOT_COMPARED:
            rows = await connection.fetch(f'SELECT t::text FROM "{name}" AS t ORDER BY t::text COLLATE "C"')
            found[name] = [row[0] for row in rows]
    return {name: rows for name, rows in found.items() if rows}


async def read_dead_letters(connection: Any) -> dict[Position, DecodeError]:
    """Errors of the records that workers skipped, by position, from their dead letters."""
    query = "SELECT d.* FROM dead_letters AS d JOIN pending_letters USING (topic, log_partition, log_offset)"
    return {
        Position(r["topic"], r["log_partition"], r["log_offset"]): DecodeError(r["reason"], r["detail"])
        for r in await connection.fetch(query)
    }


async def delete_rows(connection: Any) -> None:
    """Delete all rows of all tables."""
    names = [name for (name,) in await connection.fetch(TABLES) if not name.startswith(("_yoyo", "yoyo"))]
    await connection.execute("".join(f'DELETE FROM "{name}";' for name in names))


def _is_misread(record: StoredRecord, num_misread: int) -> bool:
    return random.Random(str(record.position)).randrange(10) < num_misread


def _misread(record: StoredRecord) -> StoredRecord:
    return record._replace(value=b"misread by a worker with a bug")
