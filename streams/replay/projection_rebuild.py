"""Replays the log into a scratch schema, and swaps it with the live one.

The steps, in the order that makes this correct:
1. project, in rounds, up to the positions of the live projections; workers continue meanwhile;
2. carry over from the live rows what the log no longer holds; compare, if requested;
3. lock the workers' positions: nothing is projected into the live schema from here on (readers notice nothing);
4. project and carry over the remainder;
5. wait until no transaction has a snapshot from before step 4, since it would miss those last rows;
6. rename both schemas in one transaction. No table is locked: the next statement of a reader finds the new tables, by
   name or by its prepared plan, which Postgres plans again; a running statement ends on the old ones;
7. drop the old schema, once the last statement on it has ended.
A failure before step 6 leaves the live rows unchanged. If steps 3 to 5 take too long, the lock is released, and they
are tried again.
"""

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import asyncpg

from esper.config import Settings
from esper.errors import ConflictError
from esper.oona.records import TopicPartition
from esper.schemas.topics import TELEMETRY, TOPICS
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect
from esper.streams.database.migrations import missing_migrations
from esper.streams.database.sql_queries import queries, quoted
from esper.streams.database.stored_positions import stored_positions
from esper.streams.replay.expired_rows import carry_over
from esper.streams.replay.replay_log_reader import Offsets
from esper.streams.replay.replay_projection import ProgressCallback, ignore_progress
from esper.streams.replay.replay_schemas import (
    BEFORE,
    REPLACED,
    SchemaMark,
    copy_privileges,
    drop_schema,
    mark_schema,
)
from esper.streams.replay.replay_session import ReplaySession, open_scratch_session
from esper.streams.replay.row_comparison import Side, TableComparison, tables_of
from esper.streams.replay.verification import compare_with_live, frozen_connection

FEW_RECORDS = 2_000  # projected under the lock in a fraction of a second
MAX_ROUNDS = 20  # workers that are faster than the rebuild for so long will remain so
LOCK_TIMEOUT_MS = 10_000  # longer than a batch's transaction; workers queue behind a waiting lock
SNAPSHOT_WAIT_S = 5.0  # under the lock, while workers wait; a reader's transaction takes milliseconds
MAX_TRIES = 10
RETRY_S = 2.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """The result of a rebuild.

    Attributes:
        is_swapped: False if the comparison found differences that were not accepted: the live rows are unchanged.
        comparisons: every table, live against rebuilt; empty if no comparison was requested.
        num_carried_over: health windows that were copied from the live rows, since the log no longer has their start.
        locked_s: for how long workers could not commit.
        kept_as: the schema with the replaced rows, if the log cannot reproduce them.
    """

    num_records: int
    is_swapped: bool
    comparisons: tuple[TableComparison, ...] = ()
    num_carried_over: int = 0
    locked_s: float = 0.0
    kept_as: str | None = None


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """How a rebuild compares before the swap: differing rows to show per table, and whether to swap regardless."""

    num_shown: int = 0
    accepts_changes: bool = False


class _BusyError(Exception):
    """The swap would block workers or readers for too long; the message names the blocking process."""


async def rebuild(
    settings: Settings,
    on_progress: ProgressCallback = ignore_progress,
    comparison: ComparisonOptions | None = None,
) -> RebuildResult:
    """Replay the log as far as workers have projected it, and replace the live projections with the result.

    Workers and readers continue meanwhile. Records that workers have not read are left to them, since they write the
    dead letters. Rows that the log cannot reproduce (it is another cluster's, or lost records that are kept forever)
    are not dropped but kept in a separate schema.

    Raises:
        ConflictError: another rebuild or verification runs, or a transaction blocks the swap.
        NewerVersionError: the log holds an event that needs a newer program.
        NotAllowedError, UnavailableError, ConfigError: Postgres or Kafka; the live rows are unchanged.
    """
    async with open_scratch_session(settings, on_progress) as session:
        known = await session.live.fetchval("SELECT cluster_id FROM cluster")
        return await _Rebuild(session, is_same_cluster=known in (None, session.cluster_id)).run(comparison)


@dataclass(slots=True)
class _Rebuild:
    """A rebuild in progress."""

    session: ReplaySession
    is_same_cluster: bool
    carried_over_at: Offsets = field(init=False, default_factory=dict)
    num_carried_over: int = field(init=False, default=0)

    async def run(self, comparison: ComparisonOptions | None) -> RebuildResult:
        """Execute every step."""
        projector, schema = self.session.projector, self.session.schema
        comparisons: tuple[TableComparison, ...] = ()
        if comparison is not None:
            comparisons = await self._compare(comparison.num_shown)
            if not comparison.accepts_changes and not all(c.is_equal for c in comparisons):
                return RebuildResult(projector.num_records, is_swapped=False, comparisons=comparisons)
        await self._catch_up()
        await self._carry_over()
        projector.report("gathering statistics")
        for table in await tables_of(Side(projector.connection, schema)):
            await projector.connection.execute(f"ANALYZE {quoted(schema)}.{quoted(table)}")
        kept_as = await self._name_for_replaced_rows()
        locked_s = await self._swap_with_retries(kept_as or self._replaced_name)
        if kept_as is None:
            await self._drop_replaced()
        return RebuildResult(
            projector.num_records,
            is_swapped=True,
            comparisons=comparisons,
            num_carried_over=self.num_carried_over,
            locked_s=locked_s,
            kept_as=kept_as,
        )

    @property
    def _live_name(self) -> str:
        return self.session.postgres.schema_name

    @property
    def _replaced_name(self) -> str:
        return f"{self._live_name}_{REPLACED}"

    async def _live_positions(self, connection: Connection) -> Offsets:
        """The positions of the live projections in this cluster's log; none if they come from another cluster."""
        return await stored_positions(connection) if self.is_same_cluster else {}

    async def _catch_up(self) -> None:
        """Project, in rounds, until few records are left."""
        for _n in range(MAX_ROUNDS):
            await self.session.project_to(await self._live_positions(self.session.live))
            if self.session.projector.num_left(await self._live_positions(self.session.live)) <= FEW_RECORDS:
                return
        raise ConflictError(
            f"the rebuild did not catch up in {MAX_ROUNDS} rounds, since workers project as fast as it does; the live "
            "rows are unchanged: rebuild while fewer records arrive, or stop the workers meanwhile"
        )

    async def _carry_over(self) -> None:
        if not self.is_same_cluster:
            return
        connection = self.session.projector.connection
        first, positions = await self.session.reader.first_offsets(), await self._live_positions(self.session.live)
        partitions = sorted(n for _topic, n in self._changed_telemetry(positions))
        async with connection.transaction():
            self.num_carried_over += await carry_over(
                connection, self._live_name, self.session.schema, first, partitions
            )
        self.carried_over_at = positions

    def _changed_telemetry(self, positions: Offsets) -> set[TopicPartition]:
        """Telemetry partitions that workers projected since rows were last carried over."""
        return {
            tp for tp, offset in positions.items() if tp[0] == TELEMETRY.name and offset != self.carried_over_at.get(tp)
        }

    async def _compare(self, num_shown: int) -> tuple[TableComparison, ...]:
        """Project up to one moment of the live rows, and compare with the live rows of that moment."""
        async with frozen_connection(self.session.postgres) as frozen:
            await self.session.project_to(await self._live_positions(frozen))
            return tuple(await compare_with_live(self.session, frozen, num_shown))

    async def _name_for_replaced_rows(self) -> str | None:
        """The name under which to keep the replaced rows; None if the log can reproduce all of them."""
        stored = await stored_positions(self.session.live)
        if self.is_same_cluster:
            first, end = await self.session.reader.first_offsets(), await self.session.reader.end_offsets()
            has_lost_start = any(first[tp] for topic in TOPICS if topic != TELEMETRY for tp in topic.partitions)
            if not has_lost_start and not any(end[tp] < offset for tp, offset in stored.items()):
                return None
        elif not stored:
            return None
        return f"{self._live_name}_{BEFORE}_{datetime.now(UTC):%Y%m%d%H%M%S}"

    async def _swap_with_retries(self, replaced: str) -> float:
        for n in range(MAX_TRIES):
            try:
                return await self._swap(replaced)
            except (_BusyError, asyncpg.LockNotAvailableError) as error:
                busy = error
            self.session.projector.report(f"waiting ({busy}), attempt {n + 2} of {MAX_TRIES}")
            await asyncio.sleep(RETRY_S)
            await self._catch_up()
        raise ConflictError(
            f"the rebuilt rows could not be swapped in: {busy}; the live rows are unchanged: end that transaction, "
            "then rebuild again"
        )

    async def _swap(self, replaced: str) -> float:
        """Execute steps 3 to 6; returns for how many seconds the lock was held."""
        name, report = self._live_name, self.session.projector.report
        connection = await connect(self.session.postgres)
        try:
            report("waiting for the lock on the workers' positions")
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
                await connection.execute(f"LOCK TABLE {quoted(name)}.positions IN EXCLUSIVE MODE")
                began = time.monotonic()
                report("catching up")
                await self._finish()
                report("swapping")
                await self._wait_for_older_snapshots()
                await connection.execute(f"ALTER SCHEMA {quoted(name)} RENAME TO {quoted(replaced)}")
                await connection.execute(f"ALTER SCHEMA {quoted(self.session.schema)} RENAME TO {quoted(name)}")
                is_kept = replaced != self._replaced_name
                why = "rows that the log could not reproduce, from before a rebuild" if is_kept else ""
                mark = SchemaMark(BEFORE if is_kept else REPLACED, name, why, is_complete=True)
                await mark_schema(connection, replaced, mark)
                await connection.execute(f"COMMENT ON SCHEMA {quoted(name)} IS NULL")
            return time.monotonic() - began
        finally:
            await connection.close()

    async def _finish(self) -> None:
        """Project and copy the remainder while workers are locked out: records, dead letters, windows, privileges."""
        name, rebuilt = self._live_name, self.session.projector.connection
        await self.session.project_to(await self._live_positions(self.session.live))
        await self._carry_over()
        async with rebuilt.transaction():
            await rebuilt.execute("DELETE FROM pending_letters")
            await rebuilt.execute(f"INSERT INTO pending_letters TABLE {quoted(name)}.pending_letters")
            await copy_privileges(rebuilt, name, self.session.schema)
        if missing := await missing_migrations(self.session.live):
            raise ConflictError(f"schema {name!r} was migrated meanwhile ({', '.join(missing)}): rebuild again")

    async def _wait_for_older_snapshots(self) -> None:
        """Wait until every transaction has ended whose snapshot may be older than the rebuilt rows."""
        sql, live, deadline = queries("replay"), self.session.live, time.monotonic() + SNAPSHOT_WAIT_S
        locked = f"{quoted(self._live_name)}.positions"
        older = [dict(row) async for row in sql.open_snapshots(live, locked=locked)]
        while older:
            if time.monotonic() > deadline:
                who = ", ".join(f"process {r['pid']} ({r['user_name']}, {r['application_name'] or '?'})" for r in older)
                raise _BusyError(f"{who} reads in a transaction that began before")
            await asyncio.sleep(POLL_S)
            current = {(row["pid"], row["transaction"]) async for row in sql.open_snapshots(live, locked=locked)}
            older = [r for r in older if (r["pid"], r["transaction"]) in current]

    async def _drop_replaced(self) -> None:
        try:
            await drop_schema(self.session.live, self._replaced_name)
        except ConflictError as error:
            self.session.projector.report(str(error))
