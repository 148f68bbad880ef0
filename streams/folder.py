"""LogFolder: what a worker holds open, and what it does with each batch.

Owns the pool, the producer for dead letters, the slot and the metrics. It refuses to open on a
log that does not fit the projections; later, a partition that cannot go on is stopped and
shown red, while the others go on. No exception leaves ``fold``: a Faust agent would ack the batch.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import stamina

from esper.config import Settings, state_dir
from esper.errors import EsperError, NewerVersionError, NotAllowedError, PositionError, UnavailableError
from esper.logging import get_logger
from esper.oona.permissions import verify_group, verify_readable
from esper.oona.producer import OonaProducer
from esper.oona.progress import ProgressWatch, StallTeller
from esper.oona.topics import verify_topics
from esper.schemas.topics import TOPICS
from esper.streams.database import connect_pool
from esper.streams.folding import Batch, fold
from esper.streams.letters import send_pending
from esper.streams.memory import PartitionMemory
from esper.streams.metrics import WorkerMetrics
from esper.streams.positions import check_position, stored_positions, verify_log
from esper.streams.queries import queries
from esper.streams.settings import StreamsSettings
from esper.streams.slots import take_slot

Place = tuple[str, int]
"""(topic, partition)."""

TRANSIENT = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InvalidCachedStatementError,  # a rebuild was swapped in
    asyncpg.UndefinedTableError,
    asyncpg.InternalServerError,
    UnavailableError,
    NotAllowedError,
    OSError,
)
"""What a retry can mend: Postgres or Kafka is away, full or busy, or a right is given back."""

_log = get_logger(__name__)


class LogFolder:
    """Async: ``open`` before the first batch, ``close`` after the last."""

    def __init__(self, settings: Settings, streams: StreamsSettings) -> None:
        self.metrics = WorkerMetrics()
        self.instance_id = ""
        self._settings = settings
        self._streams = streams
        self._exits = AsyncExitStack()
        self._red: dict[Place, str] = {}
        self._memories: dict[Place, PartitionMemory] = {}
        self._watch = ProgressWatch(streams.stalled_after_s)
        self._teller = StallTeller("worker")
        self._pool: Any = None
        self._producer: OonaProducer | None = None

    async def open(self) -> None:
        """Check that topics, log and projections fit, then open everything.

        Raises:
            ConfigError, NotAllowedError, UnavailableError, PositionError, ConflictError: with what to do.
        """
        kafka, postgres = self._settings.need_kafka(), self._settings.need_postgres()
        async with AsyncExitStack() as exits:
            await verify_topics(kafka)
            await verify_group(kafka, self._streams.group)
            await verify_readable(kafka, [t.name for t in TOPICS])
            self._pool = await exits.enter_async_context(connect_pool(postgres))
            async with self._pool.acquire() as connection:
                await verify_log(connection, kafka)
            self._producer = await exits.enter_async_context(OonaProducer(kafka, client_id="esper-streams"))
            slot = take_slot(state_dir() / "slots", self._streams.slot)
            exits.callback(slot.release)
            self.instance_id = slot.instance_id
            port = self.metrics.serve(self._streams.metrics_port)
            exits.callback(self.metrics.stop)
            self._exits = exits.pop_all()
        _log.info("worker.opened", instance=self.instance_id, metrics_port=port)

    async def close(self) -> None:
        """Close what ``open`` opened."""
        await self._exits.aclose()

    async def fold(self, batch: Batch, *, is_current: bool) -> None:
        """Fold a batch; try again for as long as Postgres or Kafka is away.

        Args:
            is_current: False where the partition went to another worker meanwhile, whose
                position then counts.
        """
        place = (batch.topic, batch.partition)
        if place in self._red:
            return
        retries = stamina.retry_context(
            on=TRANSIENT, attempts=None, timeout=None, wait_max=self._streams.retry_max_delay_s
        )
        try:
            async for attempt in retries:
                with attempt:
                    await self._fold_once(batch)
            self._watch.reached(place, batch.end)
        except PositionError as error:
            if is_current:
                self._stop(place, str(error))
        except NewerVersionError as error:
            self._stop(place, str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _log.exception("fold.failed", topic=batch.topic, partition=batch.partition, start=batch.start)
            self._stop(place, f"{type(error).__name__}: {error}")

    async def positions(
        self, assigned: set[Place], first: Mapping[Place, int], last: Mapping[Place, int]
    ) -> dict[Place, int]:
        """The offset to read each partition from, checked against the log as it is now.

        Args:
            first: the oldest offset of each partition; ``last`` the next one to be written.
        """
        async with self._pool.acquire() as connection:
            stored = await stored_positions(connection)
            await self._send_left_letters(connection, assigned)
        positions = {}
        self._memories.clear()
        for place in self._watch.places - assigned:
            self._watch.end(place)
            self.metrics.forget(place)
        for place in sorted(assigned):
            self._red.pop(place, None)
            positions[place] = stored.get(place, first.get(place, 0))
            self._watch.begin(place, positions[place])
            try:
                check_position(place, positions[place], first, last)
            except PositionError as error:
                self._stop(place, str(error))
        return positions

    def watch(self, ends: Mapping[Place, int | None]) -> None:
        """Tell of the partitions that do not get on: in the log, and to Prometheus.

        Args:
            ends: the end of each partition's log; None where the broker did not say.
        """
        stalls = self._watch.stalls(ends)
        self._teller.tell(stalls)
        self.metrics.stalled(self._watch.places, stalls)

    async def _send_left_letters(self, connection: Any, assigned: set[Place]) -> None:
        """Send what an earlier owner of these partitions decided on and did not get to send."""
        assert self._producer is not None
        rows = [row async for row in queries("letters").all_pending(connection)]
        for place in sorted({(row["topic"], row["log_partition"]) for row in rows} & assigned):
            try:
                await send_pending(connection, *place, self._producer)
            except EsperError as error:
                # they wait on; the next letter or assignment takes them along
                _log.warning("letters.waiting", topic=place[0], partition=place[1], error=str(error))

    async def _fold_once(self, batch: Batch) -> None:
        assert self._producer is not None
        try:
            with self.metrics.folding(batch.topic):
                async with self._pool.acquire() as connection:
                    memory = self._memories.setdefault((batch.topic, batch.partition), PartitionMemory())
                    folded = await fold(connection, batch, memory=memory)
                    if folded.has_letters:
                        await send_pending(connection, batch.topic, batch.partition, self._producer)
        except TRANSIENT as error:
            self._watch.troubled((batch.topic, batch.partition), f"it cannot be folded: {error!r:.200}")
            raise
        self.metrics.folded(batch, folded.num_events)

    def _stop(self, place: Place, reason: str) -> None:
        topic, partition = place
        self._red[place] = reason
        self._watch.stopped(place, reason)
        self.metrics.red(topic, partition)
        _log.error("partition.stopped", topic=topic, partition=partition, reason=reason)
