"""The partitions of ``health_windows``: one a day of the log, made before its first row, dropped with its age.

Both are done beside running folds: a new partition is attached under a lock that writers do not wait for, and
dropping gives up rather than make writers wait.
"""

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from esper.logging import get_logger
from esper.streams.database.connection_types import Connection
from esper.streams.database.postgres_errors import LOCK_ERRORS

TABLE = "health_windows"
DAY = timedelta(days=1)
DROP_LOCK_TIMEOUT_MS = 2_000  # longer than a fold's transaction as a rule; the next look tries again

_log = get_logger(__name__)


def partition_name(day: date) -> str:
    """The table that holds the windows whose first record the log had on that day."""
    return f"{TABLE}_{day:%Y%m%d}"


async def make_partitions(connection: Connection, days: Iterable[date]) -> None:
    """Make what is missing, in the transaction of ``connection``. Another worker may do the same meanwhile."""
    for day in sorted(set(days)):
        name = partition_name(day)
        if await _exists(connection, name):
            continue
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext(current_schema() || $1))", TABLE)
        if await _exists(connection, name):
            continue
        # not CREATE ... PARTITION OF, which would wait for every writer of the table, and make them wait
        await connection.execute(f"CREATE TABLE {name} (LIKE {TABLE} INCLUDING ALL) WITH (fillfactor = 75)")
        await connection.execute(
            f"ALTER TABLE {TABLE} ATTACH PARTITION {name} FOR VALUES FROM ('{day} 00:00Z') TO ('{day + DAY} 00:00Z')"
        )


async def drop_expired(connection: Connection, before: datetime) -> list[str]:
    """Drop the partitions all of whose windows began before ``before``; gives their names. Late signals go with them.

    One that is in use for long is left for the next time.
    """
    rows = await connection.fetch(
        "SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid "
        "WHERE i.inhparent = to_regclass($1)",
        TABLE,
    )
    first_kept = before.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    await connection.execute("DELETE FROM late_health_signals WHERE logged_at < $1", first_kept)
    limit = partition_name((first_kept - DAY).date())
    dropped = []
    for name in sorted(row["relname"] for row in rows):
        if name > limit:
            break
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {DROP_LOCK_TIMEOUT_MS}")
                await connection.execute(f"DROP TABLE IF EXISTS {name}")
        except LOCK_ERRORS:
            _log.info("window_partition.drop_delayed", table=name)
            break
        dropped.append(name)
        _log.info("window_partition.dropped", table=name)
    return dropped


async def _exists(connection: Connection, name: str) -> bool:
    # asks the catalog's rows: to_regclass may answer from a cache that is older than another worker's commit
    query = (
        "SELECT 1 FROM pg_class WHERE relname = $1 AND relnamespace = to_regnamespace(quote_ident(current_schema()))"
    )
    return await connection.fetchval(query, name) is not None
