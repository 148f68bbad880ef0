"""Handles rows whose records have expired in the log: what to compare, and what a rebuild carries over.

Telemetry expires in Kafka, and old partitions of ``health_windows`` are dropped in Postgres, at different times. So a
comparison takes only the rows that both sides can have completely:

- a health window counts if its first record is still in the log (``first_offset`` is not below the log's start) and
  its day is not older than the oldest day of the live rows;
- a window whose first record differs between the sides (the log begins in its middle, or the live window was dropped
  before its last records arrived) counts on neither side;
- the telemetry ``progress`` of a run may be ahead in the live rows if its partition has lost records, since the last
  one may have expired; it may never be behind;
- a redriven record (``redriven``, ``late_health_signals``) counts if it is still in the log; its signals also only if
  they are not older than the oldest day of the live rows.

All other topics are kept forever, and every row that is projected from them counts.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from esper.oona.log_reader import partition_of
from esper.schemas.topics import TELEMETRY
from esper.streams.database.connection_types import Connection
from esper.streams.database.health_window_partitions import TABLE as WINDOWS
from esper.streams.database.health_window_partitions import make_partitions
from esper.streams.database.sql_queries import queries, quoted
from esper.streams.replay.replay_log_reader import Offsets
from esper.streams.replay.row_comparison import ComparableRows, RowFilter, Side

LATE = "late_health_signals"
WINDOW_KEY = ("run_id", "incarnation", "layer_id", "seed_id", "step")
WINDOW_TYPES = ("text", "integer", "text", "integer", "bigint")
_PARTITION_START = re.compile(r"FROM \('([^']+)'\)")


async def comparable_rows(live: Side, rebuilt: Side, first: Offsets) -> ComparableRows:
    """Apply the rules above to two schemas of one database.

    Args:
        live: its connection sees the live rows as they are compared; that of ``rebuilt`` sees them as they are now.
        first: the oldest offset of each partition, read after the rebuilt rows were projected.
    """
    firsts = [first[tp] for tp in TELEMETRY.partitions]
    oldest = await oldest_day(rebuilt.connection, live.schema)
    differing = await _windows_with_other_start(rebuilt.connection, live.schema, rebuilt.schema, firsts, oldest)
    ahead = await _runs_ahead(live, rebuilt, firsts)
    unnested = ", ".join(f"${n + 2}::{kind}[]" for n, kind in enumerate(WINDOW_TYPES))
    no_key = f"NOT EXISTS (SELECT FROM unnest({unnested}) AS k ({', '.join(WINDOW_KEY)}) WHERE {_same_key('k', 't')})"
    no_run = (
        "NOT EXISTS (SELECT FROM unnest($2::text[], $3::integer[]) AS k (run_id, incarnation)"
        " WHERE k.run_id = t.run_id AND k.incarnation = t.incarnation)"
    )
    progress = RowFilter(f"(t.topic <> $1 OR {no_run})", (TELEMETRY.name, *_columns(ahead, 2)))
    redriven = RowFilter(
        "(t.topic <> $1 OR t.redriven_offset >= ($2::bigint[])[t.log_partition + 1])", (TELEMETRY.name, firsts)
    )
    in_log = RowFilter(f"t.first_offset >= ($1::bigint[])[t.log_partition + 1] AND {no_key}", (firsts, *differing))
    recent = RowFilter(f"($1::timestamptz IS NULL OR t.logged_at >= $1) AND {no_key}", (oldest, *differing))
    late = RowFilter(
        "t.log_offset >= ($1::bigint[])[t.log_partition + 1] AND ($2::timestamptz IS NULL OR t.logged_at >= $2)",
        (firsts, oldest),
    )
    same = {"progress": progress, "redriven": redriven, LATE: late}
    return ComparableRows({WINDOWS: in_log, **same}, {WINDOWS: recent, **same})


async def oldest_day(connection: Connection, schema: str) -> datetime | None:
    """The start of the oldest partition of a schema's health windows; None if there is none."""
    await connection.execute("SET timezone = 'UTC'")
    bounds = [
        row["bound"] async for row in queries("replay").partition_bounds(connection, schema=schema, table=WINDOWS)
    ]
    starts = [found[1] for bound in bounds if (found := _PARTITION_START.search(bound)) is not None]
    return min((datetime.fromisoformat(start) for start in starts), default=None)


async def carry_over(
    connection: Connection, live_schema: str, rebuilt_schema: str, first: Offsets, partitions: Sequence[int]
) -> int:
    """Copy what only the live rows have into the rebuilt ones: windows whose first record has expired (completely,
    even if their end is in the log), and the progress of telemetry. A repeated call copies what changed meanwhile.

    Args:
        connection: has ``rebuilt_schema`` first in its search path, and is in a transaction.
        partitions: the telemetry partitions that workers projected since the last call.

    Returns:
        The number of windows.
    """
    live, rebuilt = quoted(live_schema), quoted(rebuilt_schema)
    firsts = [first[tp] for tp in TELEMETRY.partitions]
    expired = "l.log_partition = ANY($2::integer[]) AND l.first_offset < ($1::bigint[])[l.log_partition + 1]"
    using = f"({', '.join(WINDOW_KEY)})"
    await connection.execute(
        "CREATE TEMP TABLE carried_over ON COMMIT DROP AS"
        f" SELECT l.* FROM {live}.{WINDOWS} AS l LEFT JOIN {rebuilt}.{WINDOWS} AS r USING {using}"
        f" WHERE {expired} AND (r.first_offset, r.num_signals) IS DISTINCT FROM (l.first_offset, l.num_signals)",
        firsts,
        [n for n in partitions if firsts[n] > 0],
    )
    days = await connection.fetch("SELECT DISTINCT (logged_at AT TIME ZONE 'UTC')::date AS day FROM carried_over")
    await make_partitions(connection, [row["day"] for row in days])
    await connection.execute(
        f"DELETE FROM {rebuilt}.{WINDOWS} AS r USING carried_over AS l WHERE {_same_key('l', 'r')}"
    )
    await connection.execute(f"INSERT INTO {rebuilt}.{WINDOWS} SELECT * FROM carried_over")
    lost_start = [n for n, offset in enumerate(firsts) if offset > 0]
    if lost_start:
        await _carry_over_progress(connection, live, rebuilt, set(lost_start))
        await connection.execute(
            f"INSERT INTO {rebuilt}.redriven SELECT * FROM {live}.redriven AS l WHERE topic = $2"
            " AND l.redriven_offset < ($1::bigint[])[l.log_partition + 1] ON CONFLICT DO NOTHING",
            firsts,
            TELEMETRY.name,
        )
        await connection.execute(
            f"INSERT INTO {rebuilt}.{LATE} SELECT * FROM {live}.{LATE} AS l"
            " WHERE l.log_offset < ($1::bigint[])[l.log_partition + 1] ON CONFLICT DO NOTHING",
            firsts,
        )
    return int(await connection.fetchval("SELECT count(*) FROM carried_over"))


async def _carry_over_progress(connection: Connection, live: str, rebuilt: str, lost_start: set[int]) -> None:
    rows = await connection.fetch(f"SELECT run_id FROM {live}.progress WHERE topic = $1", TELEMETRY.name)
    runs = [run_id for (run_id,) in rows if partition_of(run_id, TELEMETRY) in lost_start]
    await connection.execute(
        f"INSERT INTO {rebuilt}.progress AS r SELECT * FROM {live}.progress AS l"
        " WHERE l.topic = $1 AND l.run_id = ANY($2)"
        " ON CONFLICT (run_id, incarnation, topic) DO UPDATE SET"
        " last_sequence = greatest(r.last_sequence, EXCLUDED.last_sequence),"
        " last_step = greatest(r.last_step, EXCLUDED.last_step)",
        TELEMETRY.name,
        runs,
    )


async def _windows_with_other_start(
    connection: Connection, live: str, rebuilt: str, firsts: Sequence[int], oldest: datetime | None
) -> tuple[list[Any], ...]:
    """The keys of windows whose first record differs between the sides, as columns."""
    rows = await connection.fetch(
        f"SELECT {', '.join(f'l.{name}' for name in WINDOW_KEY)} FROM {quoted(live)}.{WINDOWS} AS l"
        f" JOIN {quoted(rebuilt)}.{WINDOWS} AS r ON {_same_key('l', 'r')}"
        " WHERE l.first_offset <> r.first_offset"
        " AND (l.first_offset < ($1::bigint[])[l.log_partition + 1] OR r.logged_at < $2)",
        firsts,
        oldest,
    )
    return _columns([tuple(row) for row in rows], len(WINDOW_KEY))


async def _runs_ahead(live: Side, rebuilt: Side, firsts: Sequence[int]) -> list[tuple[str, int]]:
    """(run, incarnation) whose telemetry progress is ahead in the live rows, in partitions that lost records."""
    query = "SELECT run_id, incarnation, last_sequence FROM {}.progress WHERE topic = $1"
    rows = await rebuilt.connection.fetch(query.format(quoted(rebuilt.schema)), TELEMETRY.name)
    reached = {(row["run_id"], row["incarnation"]): row["last_sequence"] for row in rows}
    rows = await live.connection.fetch(query.format(quoted(live.schema)), TELEMETRY.name)
    return [
        (row["run_id"], row["incarnation"])
        for row in rows
        if firsts[partition_of(row["run_id"], TELEMETRY)] > 0
        and row["last_sequence"] > reached.get((row["run_id"], row["incarnation"]), -1)
    ]


def _same_key(left: str, right: str) -> str:
    return " AND ".join(f"{left}.{name} = {right}.{name}" for name in WINDOW_KEY)


def _columns(rows: Sequence[tuple[Any, ...]], num_columns: int) -> tuple[list[Any], ...]:
    return tuple([row[n] for row in rows] for n in range(num_columns))
