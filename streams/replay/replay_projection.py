"""Folds ranges of the log into a schema that nobody reads yet, as fast as it goes.

Partitions are independent of each other: they are dealt out to a few connections, and while one batch
is written, the next ones are read and decoded. Each partition stays on its connection, in its order.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

from esper.config import PostgresSettings
from esper.errors import DecodeError
from esper.oona.records import Position, TopicPartition
from esper.schemas.topics import TOPICS
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect
from esper.streams.replay.replay_log_reader import LogReader, Offsets
from esper.streams.worker.batch_projection import Batch, project_batch
from esper.streams.worker.partition_cache import PartitionCache

NUM_LANES = 3  # connections that fold side by side; more gave nothing on two cores
READ_AHEAD = 2  # batches that wait for each of them: bounds memory

Letters = Mapping[Position, DecodeError]


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """How far a replay is: what it does, records folded, and records that are to be folded in all."""

    phase: str
    num_records: int
    num_expected: int


ProgressCallback = Callable[[ReplayProgress], None]


def ignore_progress(_told: ReplayProgress) -> None:
    """For callers that show no progress."""


class ReplayProjector:
    """Made by ``open_replay_projector``: folds on and on from the start of the log, round by round."""

    def __init__(
        self, connections: list[Connection], reader: LogReader, first: Offsets, tell: ProgressCallback
    ) -> None:
        self.num_records = 0
        self.first = first
        self._connections = connections
        self._reader = reader
        self._tell = tell
        self._reached = {(t.name, n): first[t.name, n] for t in TOPICS for n in range(t.num_partitions)}
        self._lanes = {(t.name, n): i + n for i, t in enumerate(TOPICS) for n in range(t.num_partitions)}
        self._caches: dict[TopicPartition, PartitionCache] = {}
        self._expected = 0
        self._phase = "folding"

    @property
    def connection(self) -> Connection:
        """One that sees the schema; free between two rounds."""
        return self._connections[0]

    def left(self, ends: Offsets) -> int:
        """Offsets between where the folding stands and ``ends``."""
        return sum(max(0, end - self._reached[place]) for place, end in ends.items())

    def say(self, phase: str) -> None:
        """Tell what is done now."""
        self._phase = phase
        self._tell(ReplayProgress(phase, self.num_records, self._expected))

    async def replay_to(self, ends: Offsets, letters: Letters) -> None:
        """Fold every record below ``ends`` that was not folded yet; afterwards the positions are ``ends``.

        Args:
            ends: partitions that are not in it stay as they are. What lies outside the log is cut off.
            letters: the records that live workers passed over.
        """
        last = await self._reader.end_offsets()
        goals = {place: max(self._reached[place], min(end, last[place])) for place, end in ends.items()}
        self._expected = self.num_records + self.left(goals)
        self.say(self._phase)
        try:
            async with asyncio.TaskGroup() as group:
                queues = [asyncio.Queue[Batch | None](READ_AHEAD) for _connection in self._connections]
                for connection, queue in zip(self._connections, queues, strict=True):
                    group.create_task(self._fold_lane(connection, queue, letters))
                async with aclosing(self._reader.read(self._reached, goals)) as batches:
                    async for batch in batches:
                        await queues[self._lanes[batch.topic, batch.partition] % len(queues)].put(batch)
                for queue in queues:
                    await queue.put(None)
        except ExceptionGroup as group_error:  # the first failure cancelled the others
            raise group_error.exceptions[0] from None
        await self._note_positions(goals)

    async def _fold_lane(self, connection: Connection, queue: "asyncio.Queue[Batch | None]", letters: Letters) -> None:
        while (batch := await queue.get()) is not None:
            place = (batch.topic, batch.partition)
            cache = self._caches.setdefault(place, PartitionCache())
            await project_batch(connection, batch, letters, cache)
            self._reached[place] = batch.end
            self.num_records += len(batch.records)
            self._tell(ReplayProgress(self._phase, self.num_records, self._expected))

    async def _note_positions(self, goals: Mapping[TopicPartition, int]) -> None:
        """Offsets at the end of a range may hold no record; the position goes past them all the same."""
        await self.connection.executemany(
            "INSERT INTO positions (topic, log_partition, next_offset) VALUES ($1, $2, $3)"
            " ON CONFLICT (topic, log_partition) DO UPDATE SET next_offset = EXCLUDED.next_offset"
            " WHERE positions.next_offset < EXCLUDED.next_offset",
            [(*place, goal) for place, goal in sorted(goals.items())],
        )
        self._reached.update(goals)


@asynccontextmanager
async def open_replay_projector(
    postgres: PostgresSettings, schema: str, reader: LogReader, tell: ProgressCallback
) -> AsyncIterator[ReplayProjector]:
    """A refolder with connections of its own to ``schema``, which is empty.

    Raises:
        NotAllowedError, UnavailableError, ConfigError: as ``esper.streams.database.connections.connect``.
    """
    async with AsyncExitStack() as exits:
        connections = []
        for _n in range(NUM_LANES):
            connection = await connect(postgres, schema)
            exits.push_async_callback(connection.close)
            # a crash costs a schema that is thrown away anyway; the swap's own commit flushes all before it
            await connection.execute("SET synchronous_commit = off")
            connections.append(connection)
        yield ReplayProjector(connections, reader, await reader.first_offsets(), tell)
