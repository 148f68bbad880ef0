"""What the log does not hold any more, and what of the live rows that touches.

Telemetry expires in Kafka, and old partitions of ``health_windows`` are dropped in Postgres. The two do not happen at
the same moment, so a comparison takes only what both sides can have whole:

- a health window counts where its first record is still in the log (``first_offset`` is not below the log's start)
  and its day is not older than the oldest day that live has;
- a window that both sides know by another first record (the log begins in its middle, or live had dropped it before
  its last records came) counts on neither side;
- how far a run's telemetry is (``progress``) may be ahead in live where the log has lost its start: the record that
  said so may have expired. It may never be behind;
- a redriven record (``redriven``, ``late_health_signals``) counts where it is still in the log; its signals also only
  where they are not older than live's oldest day.

All other topics are kept for ever, and everything that is folded from them counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from esper.oona.log_reader import partition_of
from esper.schemas.topics import TELEMETRY
from esper.streams.database.connection_types import Connection
from esper.streams.database.health_window_partitions import TABLE as WINDOWS
from esper.streams.database.health_window_partitions import make_partitions
from esper.streams.database.sql_queries import queries
from esper.streams.replay.replay_log_reader import Offsets
from esper.streams.replay.replay_schemas import quoted

LATE = "late_health_signals"
WINDOW_KEY = ("run_id", "incarnation", "layer_id", "seed_id", "step")
WINDOW_TYPES = ("text", "integer", "text", "integer", "bigint")
_FROM = re.compile(r"FROM \('([^']+)'\)")


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a table: an SQL condition on ``t``, and its arguments."""

    condition: str
    arguments: tuple[Any, ...] = ()


ALL_ROWS = Rows("true")


@dataclass(frozen=True, slots=True)
class Compared:
    """The rows that both sides can have whole, by table; all rows of a table that is not in it."""

    live: Mapping[str, Rows]
    rebuilt: Mapping[str, Rows]


async def comparable_rows(
    live: Connection, live_schema: str, rebuilt: Connection, rebuilt_schema: str, first: Offsets
) -> Compared:
    """The rules above, for two schemas of one database.

    Args:
        live: sees the live rows as they are compared; ``rebuilt`` sees the rebuilt ones, and live as it is now.
        first: the log's start after the rebuilt rows were folded.
    """
    firsts = [first[TELEMETRY.name, n] for n in range(TELEMETRY.num_partitions)]
    oldest = await oldest_day(rebuilt, live_schema)
    apart = await _windows_apart(rebuilt, live_schema, rebuilt_schema, firsts, oldest)
    ahead = await _runs_ahead(live, live_schema, rebuilt, rebuilt_schema, firsts)
    of_key = " AND ".join(f"k.{name} = t.{name}" for name in WINDOW_KEY)
    unnested = ", ".join(f"${n + 2}::{kind}[]" for n, kind in enumerate(WINDOW_TYPES))
    no_key = f"NOT EXISTS (SELECT FROM unnest({unnested}) AS k ({', '.join(WINDOW_KEY)}) WHERE {of_key})"
    no_run = (
        "NOT EXISTS (SELECT FROM unnest($2::text[], $3::integer[]) AS k (run_id, incarnation)"
        " WHERE k.run_id = t.run_id AND k.incarnation = t.incarnation)"
    )
    progress = Rows(f"(t.topic <> $1 OR {no_run})", (TELEMETRY.name, *_columns(ahead, 2)))
    redriven = Rows(
        "(t.topic <> $1 OR t.redriven_offset >= ($2::bigint[])[t.log_partition + 1])", (TELEMETRY.name, firsts)
    )
    inside = Rows(f"t.first_offset >= ($1::bigint[])[t.log_partition + 1] AND {no_key}", (firsts, *apart))
    young = Rows(f"($1::timestamptz IS NULL OR t.logged_at >= $1) AND {no_key}", (oldest, *apart))
    late = Rows(
        "t.log_offset >= ($1::bigint[])[t.log_partition + 1] AND ($2::timestamptz IS NULL OR t.logged_at >= $2)",
        (firsts, oldest),
    )
    same = {"progress": progress, "redriven": redriven, LATE: late}
    return Compared({WINDOWS: inside, **same}, {WINDOWS: young, **same})


async def oldest_day(connection: Connection, schema: str) -> datetime | None:
    """Where the oldest partition of a schema's health windows begins; None where there is none."""
    await connection.execute("SET timezone = 'UTC'")
    bounds = [
        row["bound"] async for row in queries("replay").partition_bounds(connection, schema=schema, table=WINDOWS)
    ]
    starts = [found[1] for bound in bounds if (found := _FROM.search(bound)) is not None]
    return min((datetime.fromisoformat(start) for start in starts), default=None)


async def carry_over(
    connection: Connection, live_schema: str, rebuilt_schema: str, first: Offsets, partitions: Sequence[int]
) -> int:
    """Put into the rebuilt rows what only the live ones know: windows whose first records have expired, and how far
    telemetry had come. Doing it again takes what changed meanwhile. Gives the number of windows.

    A window of which the log holds the end alone is taken over whole.

    Args:
        connection: sees ``rebuilt_schema`` first; in a transaction.
        partitions: those of the telemetry topic that live folded on since this was last done.
    """
    live, rebuilt = quoted(live_schema), quoted(rebuilt_schema)
    firsts = [first[TELEMETRY.name, n] for n in range(TELEMETRY.num_partitions)]
    expired = "l.log_partition = ANY($2::integer[]) AND l.first_offset < ($1::bigint[])[l.log_partition + 1]"
    using = f"({', '.join(WINDOW_KEY)})"
    await connection.execute(
        "CREATE TEMP TABLE taken_over ON COMMIT DROP AS"
        f" SELECT l.* FROM {live}.{WINDOWS} AS l LEFT JOIN {rebuilt}.{WINDOWS} AS r USING {using}"
        f" WHERE {expired} AND (r.first_offset, r.num_signals) IS DISTINCT FROM (l.first_offset, l.num_signals)",
        firsts,
        [n for n in partitions if firsts[n] > 0],
    )
    days = await connection.fetch("SELECT DISTINCT (logged_at AT TIME ZONE 'UTC')::date AS day FROM taken_over")
    await make_partitions(connection, [row["day"] for row in days])
    await connection.execute(f"DELETE FROM {rebuilt}.{WINDOWS} AS r USING taken_over AS l WHERE {_same('l', 'r')}")
    await connection.execute(f"INSERT INTO {rebuilt}.{WINDOWS} SELECT * FROM taken_over")
    lost_start = [n for n, offset in enumerate(firsts) if offset > 0]
    if lost_start:
        await _take_over_progress(connection, live, rebuilt, set(lost_start))
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
    return int(await connection.fetchval("SELECT count(*) FROM taken_over"))


async def _take_over_progress(connection: Connection, live: str, rebuilt: str, lost_start: set[int]) -> None:
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


async def _windows_apart(
    connection: Connection, live: str, rebuilt: str, firsts: Sequence[int], oldest: datetime | None
) -> tuple[list[Any], ...]:
    """The keys of windows that both sides have from different first records, column by column."""
    rows = await connection.fetch(
        f"SELECT {', '.join(f'l.{name}' for name in WINDOW_KEY)} FROM {quoted(live)}.{WINDOWS} AS l"
        f" JOIN {quoted(rebuilt)}.{WINDOWS} AS r ON {_same('l', 'r')}"
        " WHERE l.first_offset <> r.first_offset"
        " AND (l.first_offset < ($1::bigint[])[l.log_partition + 1] OR r.logged_at < $2)",
        firsts,
        oldest,
    )
    return _columns([tuple(row) for row in rows], len(WINDOW_KEY))


async def _runs_ahead(
    live: Connection, live_schema: str, rebuilt: Connection, rebuilt_schema: str, firsts: Sequence[int]
) -> list[tuple[str, int]]:
    """(run, incarnation) whose telemetry is further in live, in partitions whose log has lost its start."""
    query = "SELECT run_id, incarnation, last_sequence FROM {}.progress WHERE topic = $1"
    rows = await rebuilt.fetch(query.format(quoted(rebuilt_schema)), TELEMETRY.name)
    reached = {(row["run_id"], row["incarnation"]): row["last_sequence"] for row in rows}
    known = await live.fetch(query.format(quoted(live_schema)), TELEMETRY.name)
    return [
        (row["run_id"], row["incarnation"])
        for row in known
        if firsts[partition_of(row["run_id"], TELEMETRY)] > 0
        and row["last_sequence"] > reached.get((row["run_id"], row["incarnation"]), -1)
    ]


def _same(left: str, right: str) -> str:
    return " AND ".join(f"{left}.{name} = {right}.{name}" for name in WINDOW_KEY)


def _columns(rows: Sequence[tuple[Any, ...]], num_columns: int) -> tuple[list[Any], ...]:
    return tuple([row[n] for row in rows] for n in range(num_columns))
