"""Projects ranges of the log into a schema without readers, as fast as possible.

Partitions are independent of each other: they are distributed over a few connections, and while one batch is written,
the next ones are read and decoded. Invariant: a partition stays on its connection, and its batches stay in order.
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

NUM_CONNECTIONS = 3  # more were not faster on two cores
READ_AHEAD = 2  # batches that wait per connection: bounds memory


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """The phase of a replay, the number of projected records, and the number of records to project in all."""

    phase: str
    num_records: int
    num_expected: int


ProgressCallback = Callable[[ReplayProgress], None]


def ignore_progress(_progress: ReplayProgress) -> None:
    """Do nothing: for callers that show no progress."""


class ReplayProjector:
    """Projects the log from its start, range after range. Made by ``open_replay_projector``."""

    def __init__(
        self, connections: list[Connection], reader: LogReader, first: Offsets, on_progress: ProgressCallback
    ) -> None:
        self.num_records = 0
        self.first = first
        self._connections = connections
        self._reader = reader
        self._on_progress = on_progress
        self._positions = {tp: first[tp] for topic in TOPICS for tp in topic.partitions}
        self._queue_numbers = {tp: i + tp[1] for i, topic in enumerate(TOPICS) for tp in topic.partitions}
        self._caches: dict[TopicPartition, PartitionCache] = {}
        self._num_expected = 0
        self._phase = "projecting"

    @property
    def connection(self) -> Connection:
        """A connection to the schema; free while no range is projected."""
        return self._connections[0]

    def num_left(self, ends: Offsets) -> int:
        """How many offsets lie between the positions and ``ends``."""
        return sum(max(0, end - self._positions[tp]) for tp, end in ends.items())

    def report(self, phase: str) -> None:
        """Report that a phase begins."""
        self._phase = phase
        self._on_progress(ReplayProgress(phase, self.num_records, self._num_expected))

    async def project_to(self, ends: Offsets, skipped: Mapping[Position, DecodeError]) -> None:
        """Project every remaining record below ``ends``; afterwards the stored positions are ``ends``.

        Args:
            ends: partitions without an end stay where they are. An end beyond the log is cut to the log's end.
            skipped: the records that live workers skipped.
        """
        last = await self._reader.end_offsets()
        ends = {tp: max(self._positions[tp], min(end, last[tp])) for tp, end in ends.items()}
        self._num_expected = self.num_records + self.num_left(ends)
        self.report(self._phase)
        try:
            async with asyncio.TaskGroup() as group:
                queues = [asyncio.Queue[Batch | None](READ_AHEAD) for _connection in self._connections]
                for connection, queue in zip(self._connections, queues, strict=True):
                    group.create_task(self._project_queue(connection, queue, skipped))
                async with aclosing(self._reader.read(self._positions, ends)) as batches:
                    async for batch in batches:
                        await queues[self._queue_numbers[batch.topic, batch.partition] % len(queues)].put(batch)
                for queue in queues:
                    await queue.put(None)
        except ExceptionGroup as group_error:  # the first failure cancelled the others
            raise group_error.exceptions[0] from None
        await self._store_positions(ends)

    async def _project_queue(
        self, connection: Connection, queue: "asyncio.Queue[Batch | None]", skipped: Mapping[Position, DecodeError]
    ) -> None:
        while (batch := await queue.get()) is not None:
            tp = (batch.topic, batch.partition)
            await project_batch(connection, batch, skipped, self._caches.setdefault(tp, PartitionCache()))
            self._positions[tp] = batch.end
            self.num_records += len(batch.records)
            self._on_progress(ReplayProgress(self._phase, self.num_records, self._num_expected))

    async def _store_positions(self, ends: Offsets) -> None:
        """Move the positions to the ends: the last offsets of a range may hold no record."""
        await self.connection.executemany(
            "INSERT INTO positions (topic, log_partition, next_offset) VALUES ($1, $2, $3)"
            " ON CONFLICT (topic, log_partition) DO UPDATE SET next_offset = EXCLUDED.next_offset"
            " WHERE positions.next_offset < EXCLUDED.next_offset",
            [(*tp, end) for tp, end in sorted(ends.items())],
        )
        self._positions.update(ends)


@asynccontextmanager
async def open_replay_projector(
    postgres: PostgresSettings, schema: str, reader: LogReader, on_progress: ProgressCallback
) -> AsyncIterator[ReplayProjector]:
    """Open a projector with its own connections to ``schema``, which must be empty.

    Raises:
        NotAllowedError, UnavailableError, ConfigError: as ``esper.streams.database.connections.connect``.
    """
    async with AsyncExitStack() as exits:
        connections = []
        for _n in range(NUM_CONNECTIONS):
            connection = await connect(postgres, schema)
            exits.push_async_callback(connection.close)
            # a crash loses a schema that is dropped anyway; the commit of a swap flushes everything before it
            await connection.execute("SET synchronous_commit = off")
            connections.append(connection)
        yield ReplayProjector(connections, reader, await reader.first_offsets(), on_progress)
