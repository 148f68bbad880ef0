"""Verifies the live rows: replays the log up to the live positions, and compares the tables.

What the log no longer holds is not compared; ``esper.streams.replay.expired_rows`` has the rules.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from esper.config import PostgresSettings, Settings
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect
from esper.streams.database.stored_positions import stored_positions
from esper.streams.replay.expired_rows import comparable_rows
from esper.streams.replay.replay_projection import ProgressCallback, ignore_progress
from esper.streams.replay.replay_session import ReplaySession, open_scratch_session
from esper.streams.replay.row_comparison import Side, TableComparison, compare_all


async def verify(
    settings: Settings, on_progress: ProgressCallback = ignore_progress, num_shown: int = 0
) -> list[TableComparison]:
    """Compare every table as of one moment; workers and readers continue meanwhile.

    Args:
        num_shown: the maximum number of differing rows to find per table.

    Raises:
        ConflictError: another rebuild or verification runs.
        PositionError: the projections come from another cluster.
        NewerVersionError, NotAllowedError, UnavailableError, ConfigError: as ``rebuild``.
    """
    async with (
        open_scratch_session(settings, on_progress, is_same_cluster=True) as session,
        frozen_connection(session.postgres) as frozen,
    ):
        await session.project_to(await stored_positions(frozen))
        return await compare_with_live(session, frozen, num_shown)


@asynccontextmanager
async def frozen_connection(postgres: PostgresSettings) -> AsyncIterator[Connection]:
    """Open a connection that sees the live rows as of its first query, however long the transaction lasts."""
    connection = await connect(postgres, postgres.schema_name)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield connection
    finally:
        await connection.close()


async def compare_with_live(session: ReplaySession, frozen: Connection, num_shown: int) -> list[TableComparison]:
    """Compare the live rows that ``frozen`` sees with rows that were replayed to the same positions."""
    live, projector = Side(frozen, session.postgres.schema_name), session.projector
    rebuilt = Side(projector.connection, session.schema)
    projector.report("comparing")
    comparable = await comparable_rows(live, rebuilt, await session.reader.first_offsets())
    found = []
    async for table in compare_all(live, rebuilt, comparable, num_shown):
        projector.report(f"comparing: {table.table}")
        found.append(table)
    return sorted(found, key=lambda c: c.table)
