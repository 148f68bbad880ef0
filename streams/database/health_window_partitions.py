"""Creates and drops the daily partitions of ``health_windows``.

Owns their names, bounds and locks; the retention period is a setting of the worker. A partition holds the windows
whose first record the broker took on that day (UTC).

Invariant: neither operation blocks writers. A partition is attached under a lock that does not conflict with
theirs, and a drop gives up if it cannot get its lock soon.
"""

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from esper.logging import get_logger
from esper.streams.database.connection_types import Connection
from esper.streams.database.postgres_errors import LOCK_ERRORS

TABLE = "health_windows"
DAY = timedelta(days=1)
DROP_LOCK_TIMEOUT_MS = 2_000  # longer than most batch transactions; the next round tries again

_log = get_logger(__name__)


def partition_name(day: date) -> str:
    """The partition of one day (UTC)."""
    return f"{TABLE}_{day:%Y%m%d}"


async def make_partitions(connection: Connection, days: Iterable[date]) -> None:
    """Create missing partitions in the transaction of ``connection``; safe while other workers do the same."""
    for day in sorted(set(days)):
        name = partition_name(day)
        if await _exists(connection, name):
            continue
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext(current_schema() || $1))", TABLE)
        if await _exists(connection, name):
            continue
        # CREATE ... PARTITION OF would lock out every writer of the table
        await connection.execute(f"CREATE TABLE {name} (LIKE {TABLE} INCLUDING ALL) WITH (fillfactor = 75)")
        await connection.execute(
            f"ALTER TABLE {TABLE} ATTACH PARTITION {name} FOR VALUES FROM ('{day} 00:00Z') TO ('{day + DAY} 00:00Z')"
        )


async def drop_expired(connection: Connection, before: datetime) -> list[str]:
    """Drop the partitions that end on or before the day of ``before``, with the late signals of the same days.

    Returns:
        The names of the dropped partitions. A locked partition, and every later one, stays for the next call.
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
    # not to_regclass: its cache can be older than another worker's commit
    query = (
        "SELECT 1 FROM pg_class WHERE relname = $1 AND relnamespace = to_regnamespace(quote_ident(current_schema()))"
    )
    return await connection.fetchval(query, name) is not None
