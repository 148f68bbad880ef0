"""Folds the log anew beside the live rows, and puts the result in their place.

The order is the design:
1. fold, in rounds, into a schema of its own, as far as the live projections are; workers go on meanwhile;
2. take over from live what the log does not hold any more; compare, where that is asked for;
3. lock the workers' positions: nothing is folded into live from here on (a reader notices nothing);
4. fold and take over the little that is left;
5. wait until nobody looks through a snapshot from before 4: to such a reader these last rows would be missing;
6. rename both schemas in one transaction. No table is locked: a reader's next statement finds the new ones, by name
   or by its prepared plan, which Postgres makes anew; one that is under way ends on the old ones;
7. drop the old schema, once the last statement on it has ended.
Whatever goes wrong before 6 leaves the live rows as they were. Where 3 to 5 take long, the lock is given back, and
they are tried again.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import asyncpg

from esper.config import PostgresSettings, Settings
from esper.errors import ConflictError
from esper.oona.admin.topics import cluster_id
from esper.oona.records import TopicPartition
from esper.retry import retry_attempts
from esper.schemas.topics import TELEMETRY, TOPICS
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect
from esper.streams.database.migrations import missing_migrations
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.sql_queries import queries
from esper.streams.database.stored_positions import claim_cluster, stored_positions
from esper.streams.replay.expired_ranges import carry_over, comparable_rows
from esper.streams.replay.replay_log_reader import LogReader, Offsets, open_log
from esper.streams.replay.replay_projection import (
    ProgressCallback,
    ReplayProjector,
    ignore_progress,
    open_replay_projector,
)
from esper.streams.replay.replay_schemas import (
    BEFORE,
    REPLACED,
    Mark,
    copy_rights,
    drop_schema,
    mark_schema,
    only_replay,
    quoted,
    scratch_schema,
)
from esper.streams.replay.row_comparison import Side, TableComparison, compare_all, tables_of
from esper.streams.replay.skipped_records import SkippedRecords

FEW_RECORDS = 2_000  # folded under the lock in a fraction of a second
MAX_ROUNDS = 20  # workers that are faster than the rebuild for so long will stay so
LOCK_TIMEOUT_MS = 10_000  # longer than a fold's transaction; workers queue behind a lock that is waited for
SNAPSHOT_WAIT_S = 5.0  # under the lock, while workers wait; a reader's transaction takes milliseconds
MAX_TRIES = 10
RETRY_S = 2.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """What a rebuild did.

    Attributes:
        is_swapped: False where the comparison found differences that were not accepted: live is as it was.
        comparisons: every table, live against rebuilt; empty where it was not asked for.
        num_carried_over: health windows that were taken from live, since the log does not hold their start any more.
        locked_s: how long workers could not commit.
        kept_as: the schema that holds the rows from before, where the log cannot give them again.
    """

    num_records: int
    is_swapped: bool
    comparisons: tuple[TableComparison, ...] = ()
    num_carried_over: int = 0
    locked_s: float = 0.0
    kept_as: str | None = None


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """That, and how, a rebuild compares before it swaps."""

    num_shown: int = 0
    accepts_changes: bool = False


class _BusyError(Exception):
    """The swap would block workers or readers for too long; the message names the transaction in the way."""


BUSY_ERRORS = (_BusyError, asyncpg.LockNotAvailableError)


async def rebuild(
    settings: Settings, tell: ProgressCallback = ignore_progress, comparison: ComparisonOptions | None = None
) -> RebuildResult:
    """Fold the log anew, as far as workers have folded it, and put it in the place of the live projections.

    Workers and readers may go on meanwhile; what workers have not read is theirs to fold, since they write its dead
    letters. Rows that the log cannot give again (it is another cluster's, or has lost records that are kept for ever)
    are not thrown away but kept in a schema beside.

    Raises:
        ConflictError: another rebuild or verify is under way, or somebody stands in the way of the swap.
        NewerVersionError: the log holds an event that this program is too old for.
        NotAllowedError, UnavailableError, ConfigError: Postgres or Kafka; the live rows are as they were.
    """
    postgres, kafka = settings.need_postgres(), settings.need_kafka()
    try:
        async with AsyncExitStack() as exits:
            live = await exits.enter_async_context(only_replay(postgres))
            cluster = await cluster_id(kafka)
            reader = await exits.enter_async_context(open_log(kafka))
            schema = await exits.enter_async_context(scratch_schema(postgres, live))
            projector = await exits.enter_async_context(open_replay_projector(postgres, schema, reader, tell))
            await claim_cluster(projector.connection, cluster, kafka)
            known = await live.fetchval("SELECT cluster_id FROM cluster")
            rebuilding = _Rebuilding(postgres, live, reader, projector, schema, is_same=known in (None, cluster))
            return await rebuilding.run(comparison)
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error


@dataclass(slots=True)
class _Rebuilding:
    """One rebuild under way. ``live`` is the connection that holds the right to it."""

    postgres: PostgresSettings
    live: Connection
    reader: LogReader
    projector: ReplayProjector
    schema: str
    is_same: bool
    letters: SkippedRecords = field(init=False)
    taken_over_at: Offsets = field(init=False, default_factory=dict)
    num_carried_over: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.letters = SkippedRecords(self.reader, self.projector.first)

    async def run(self, comparison: ComparisonOptions | None) -> RebuildResult:
        """All of it."""
        self.projector.say("reading dead letters")
        await self.letters.refresh(self.live)
        await self.letters.record_expired(self.projector.connection)
        self.projector.say("folding")
        comparisons: tuple[TableComparison, ...] = ()
        if comparison is not None:
            comparisons = await self._compare(comparison.num_shown)
            if not comparison.accepts_changes and not all(c.is_equal for c in comparisons):
                return RebuildResult(self.projector.num_records, is_swapped=False, comparisons=comparisons)
        await self._catch_up()
        await self._take_over()
        self.projector.say("gathering statistics")
        for table in await tables_of(Side(self.projector.connection, self.schema)):
            await self.projector.connection.execute(f"ANALYZE {quoted(self.schema)}.{quoted(table)}")
        kept_as = await self._name_to_keep()
        locked_s = await self._swap_patiently(kept_as or f"{self.postgres.schema_name}_{REPLACED}")
        if kept_as is None:
            await self._drop_replaced()
        return RebuildResult(
            self.projector.num_records,
            is_swapped=True,
            comparisons=comparisons,
            num_carried_over=self.num_carried_over,
            locked_s=locked_s,
            kept_as=kept_as,
        )

    async def _covered(self, connection: Connection) -> Offsets:
        """How far the live projections are in this cluster's log; nowhere where they are of another one."""
        return await stored_positions(connection) if self.is_same else {}

    async def _catch_up(self) -> None:
        """Fold, in rounds, until little is left."""
        for _n in range(MAX_ROUNDS):
            covered = await self._covered(self.live)
            await self.letters.refresh(self.live)
            await self.projector.replay_to(covered, self.letters.known)
            if self.projector.left(await self._covered(self.live)) <= FEW_RECORDS:
                return
        raise ConflictError(
            f"workers fold as fast as this rebuild, it did not catch up in {MAX_ROUNDS} rounds; the live rows are as "
            "they were: rebuild while less is written, or stop the workers meanwhile"
        )

    async def _take_over(self) -> None:
        if not self.is_same:
            return
        first, positions = await self.reader.first_offsets(), await self._covered(self.live)
        moved = sorted(n for _topic, n in self._moved(positions))
        async with self.projector.connection.transaction():
            self.num_carried_over += await carry_over(
                self.projector.connection, self.postgres.schema_name, self.schema, first, moved
            )
        self.taken_over_at = positions

    def _moved(self, positions: Offsets) -> set[TopicPartition]:
        """Telemetry partitions that were folded on since rows were last taken over."""
        return {
            place
            for place, offset in positions.items()
            if place[0] == TELEMETRY.name and offset != self.taken_over_at.get(place)
        }

    async def _compare(self, num_shown: int) -> tuple[TableComparison, ...]:
        """Fold up to one moment of the live rows, and compare with live as it was at that moment."""
        async with frozen_connection(self.postgres) as seen:
            ends = await self._covered(seen)
            await self.letters.refresh(self.live)
            await self.projector.replay_to(ends, self.letters.known)
            return await compare_at(
                seen, self.postgres.schema_name, self.projector, self.schema, self.reader, num_shown
            )

    async def _name_to_keep(self) -> str | None:
        """A name for the rows from before, where the log cannot give all of them again."""
        stored = await stored_positions(self.live)
        if self.is_same:
            first, last = await self.reader.first_offsets(), await self.reader.end_offsets()
            kept = ((t.name, n) for t in TOPICS if t != TELEMETRY for n in range(t.num_partitions))
            if not any(first[place] for place in kept) and not any(last[p] < offset for p, offset in stored.items()):
                return None
        elif not stored:
            return None
        return f"{self.postgres.schema_name}_{BEFORE}_{datetime.now(UTC):%Y%m%d%H%M%S}"

    async def _swap_patiently(self, replaced: str) -> float:
        try:
            async for attempt in retry_attempts(BUSY_ERRORS, MAX_TRIES, RETRY_S, RETRY_S):
                if attempt.number > 1:
                    await self._catch_up()
                with attempt:
                    return await self._swap(replaced)
                self.projector.say(f"attempt {attempt.number} of {MAX_TRIES} to swap failed ({attempt.error}); waiting")
        except BUSY_ERRORS as error:
            raise ConflictError(
                f"the rebuilt rows could not be swapped in: {error}; the live rows are unchanged; "
                "end that transaction, then rebuild"
            ) from error
        raise AssertionError("the last attempt returns or raises")

    async def _swap(self, replaced: str) -> float:
        """Steps 3 to 6; gives the seconds between the lock and its end."""
        name = self.postgres.schema_name
        connection = await connect(self.postgres)
        try:
            self.projector.say("waiting for the workers' positions")
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
                await connection.execute(f"LOCK TABLE {quoted(name)}.positions IN EXCLUSIVE MODE")
                begun = time.monotonic()
                self.projector.say("catching up")
                await self._finish()
                self.projector.say("swapping")
                await self._wait_for_older_snapshots()
                await connection.execute(f"ALTER SCHEMA {quoted(name)} RENAME TO {quoted(replaced)}")
                await connection.execute(f"ALTER SCHEMA {quoted(self.schema)} RENAME TO {quoted(name)}")
                kind = REPLACED if replaced.endswith(REPLACED) else BEFORE
                why = "" if kind == REPLACED else "rows that the log could not give again, from before a rebuild"
                await mark_schema(connection, replaced, Mark(kind, name, why, is_complete=True))
                await connection.execute(f"COMMENT ON SCHEMA {quoted(name)} IS NULL")
            return time.monotonic() - begun
        finally:
            await connection.close()

    async def _finish(self) -> None:
        """What is left, while nobody folds: records, letters, expired windows, rights."""
        name, fresh = self.postgres.schema_name, self.projector.connection
        await self.letters.refresh(self.live)
        await self.projector.replay_to(await self._covered(self.live), self.letters.known)
        await self._take_over()
        async with fresh.transaction():
            await fresh.execute("DELETE FROM pending_letters")
            await fresh.execute(f"INSERT INTO pending_letters TABLE {quoted(name)}.pending_letters")
            await copy_rights(fresh, name, self.schema)
        if missing := await missing_migrations(self.live):
            raise ConflictError(f"live was migrated meanwhile ({', '.join(missing)}): rebuild again")

    async def _wait_for_older_snapshots(self) -> None:
        """Wait until every transaction has ended whose snapshot may be older than the rebuilt rows."""
        sql, end = queries("replay"), time.monotonic() + SNAPSHOT_WAIT_S
        locked = f"{quoted(self.postgres.schema_name)}.positions"
        older = [dict(row) async for row in sql.snapshots(self.live, locked=locked)]
        while older:
            if time.monotonic() > end:
                who = ", ".join(f"process {r['pid']} ({r['user_name']}, {r['application_name'] or '?'})" for r in older)
                raise _BusyError(f"{who} reads in a transaction that began before")
            await asyncio.sleep(POLL_S)
            now = {(row["pid"], row["transaction"]) async for row in sql.snapshots(self.live, locked=locked)}
            older = [r for r in older if (r["pid"], r["transaction"]) in now]

    async def _drop_replaced(self) -> None:
        try:
            await drop_schema(self.live, f"{self.postgres.schema_name}_{REPLACED}")
        except ConflictError as error:
            self.projector.say(str(error))


@asynccontextmanager
async def frozen_connection(postgres: PostgresSettings) -> AsyncIterator[Connection]:
    """A connection that sees the live rows as they are at its first query, however long it takes."""
    connection = await connect(postgres, postgres.schema_name)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield connection
    finally:
        await connection.close()


async def compare_at(
    seen: Connection, live_schema: str, projector: ReplayProjector, schema: str, reader: LogReader, num_shown: int
) -> tuple[TableComparison, ...]:
    """Compare live, as ``seen`` sees it, with what was folded up to the same positions."""
    rebuilt = projector.connection
    projector.say("comparing")
    compared = await comparable_rows(seen, live_schema, rebuilt, schema, await reader.first_offsets())
    found = []
    async for table in compare_all(Side(seen, live_schema), Side(rebuilt, schema), compared, num_shown):
        projector.say(f"comparing: {table.table}")
        found.append(table)
    return tuple(sorted(found, key=lambda c: c.table))
