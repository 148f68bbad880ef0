"""Compares live rows with rebuilt ones: by a digest per table, then row by row where the digests differ.

A digest is the number of rows and the sums of two 64-bit hashes of each row's text. It does not depend on the order
of the rows, needs constant memory, and changes with every altered bit.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries, quoted

NON_PROJECTION_TABLES = ("cluster", "pending_letters", "_yoyo_log", "_yoyo_migration", "_yoyo_version", "yoyo_lock")

FETCHED_KEYS = 2_000


@dataclass(frozen=True, slots=True)
class RowDifference:
    """One row that differs. ``live`` and ``rebuilt`` are its columns by name; None if the row is missing."""

    key: str
    live: dict[str, str | None] | None
    rebuilt: dict[str, str | None] | None

    @property
    def columns(self) -> list[str]:
        """The columns that differ; every column if one side lacks the row."""
        if self.live is None or self.rebuilt is None:
            return sorted(self.live or self.rebuilt or {})
        return [name for name, value in self.live.items() if value != self.rebuilt.get(name)]


@dataclass(frozen=True, slots=True)
class TableComparison:
    """The comparison of one table. ``live`` and ``rebuilt`` are (number of compared rows, their digest).

    Attributes:
        differences: the first differing rows in key order, as many as were requested.
    """

    table: str
    live: tuple[int, str]
    rebuilt: tuple[int, str]
    differences: tuple[RowDifference, ...] = field(default=())

    @property
    def is_equal(self) -> bool:
        """Whether both sides have the same rows."""
        return self.live == self.rebuilt


@dataclass(frozen=True, slots=True)
class RowFilter:
    """The rows of a table to compare: an SQL condition on ``t``, and its arguments."""

    condition: str
    arguments: tuple[Any, ...] = ()


ALL_ROWS = RowFilter("true")


@dataclass(frozen=True, slots=True)
class ComparableRows:
    """The rows to compare on each side, by table; every row of a table without an entry."""

    live: Mapping[str, RowFilter]
    rebuilt: Mapping[str, RowFilter]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: a connection, in the transaction whose snapshot is compared, and a schema."""

    connection: Connection
    schema: str

    def select(self, table: str, columns: str, rows: RowFilter) -> str:
        """A query on the compared rows of a table, whose alias is ``t``."""
        return f"SELECT {columns} FROM {quoted(self.schema)}.{quoted(table)} AS t WHERE {rows.condition}"


async def tables_of(side: Side) -> list[str]:
    """The projections in a schema, partitioned tables last."""
    rows = queries("replay").tables_of(side.connection, schema=side.schema)
    return [row["name"] async for row in rows if row["name"] not in NON_PROJECTION_TABLES]


async def compare_all(
    live: Side, rebuilt: Side, comparable: ComparableRows, num_shown: int
) -> AsyncIterator[TableComparison]:
    """Compare the comparable rows of every table that either side has.

    Args:
        num_shown: the maximum number of differing rows to find per table.
    """
    for table in dict.fromkeys([*await tables_of(live), *await tables_of(rebuilt)]):
        of_live, of_rebuilt = comparable.live.get(table, ALL_ROWS), comparable.rebuilt.get(table, ALL_ROWS)
        digests = await _digest(live, table, of_live), await _digest(rebuilt, table, of_rebuilt)
        shown: list[RowDifference] = []
        if digests[0] != digests[1] and num_shown:
            shown = await _differences(table, (live, of_live), (rebuilt, of_rebuilt), num_shown)
        yield TableComparison(table, *digests, tuple(shown))


async def _digest(side: Side, table: str, rows: RowFilter) -> tuple[int, str]:
    await _set_text_formats(side.connection)
    hashes = (
        'count(*), coalesce(sum(hashtextextended(t::text COLLATE "C", 0)), 0),'
        ' coalesce(sum(hashtextextended(t::text COLLATE "C", 1)), 0)'
    )
    (found,) = await side.connection.fetch(side.select(table, hashes, rows), *rows.arguments)
    number, first, second = found
    return number, f"{first}:{second}"


async def _set_text_formats(connection: Connection) -> None:
    """Make equal rows have equal text on both sides."""
    await connection.execute(
        "SET timezone = 'UTC'; SET datestyle = 'ISO'; SET intervalstyle = 'iso_8601'; SET bytea_output = 'hex';"
        " SET extra_float_digits = 1"
    )


async def _differences(
    table: str, live: tuple[Side, RowFilter], rebuilt: tuple[Side, RowFilter], limit: int
) -> list[RowDifference]:
    key = [
        row["name"] async for row in queries("replay").key_of(live[0].connection, schema=live[0].schema, table=table)
    ]
    wanted = await _differing_keys(table, key, live, rebuilt, limit)
    sides = [await _rows_of(table, key, side, rows, wanted) for side, rows in (live, rebuilt)]
    return [RowDifference(k, sides[0].get(k), sides[1].get(k)) for k in wanted]


async def _differing_keys(
    table: str, key: Sequence[str], live: tuple[Side, RowFilter], rebuilt: tuple[Side, RowFilter], limit: int
) -> list[str]:
    """Merge both sides in key order."""
    found: list[str] = []
    left, right = _hashes(table, key, *live), _hashes(table, key, *rebuilt)
    a, b = await anext(left, None), await anext(right, None)
    while len(found) < limit and (a is not None or b is not None):
        if b is None or (a is not None and a[0] < b[0]):
            assert a is not None
            found.append(a[0].decode())
            a = await anext(left, None)
        elif a is None or b[0] < a[0]:
            found.append(b[0].decode())
            b = await anext(right, None)
        else:
            if a[1] != b[1]:
                found.append(a[0].decode())
            a, b = await anext(left, None), await anext(right, None)
    await left.aclose()
    await right.aclose()
    return found


async def _hashes(table: str, key: Sequence[str], side: Side, rows: RowFilter) -> Any:
    """(key as UTF-8, hash of the row), sorted by the bytes of the key."""
    columns = f'{_key_text(key)} AS key, hashtextextended(t::text COLLATE "C", 0) AS hash'
    query = side.select(table, columns, rows) + " ORDER BY 1"
    async with side.connection.transaction():
        async for row in side.connection.cursor(query, *rows.arguments, prefetch=FETCHED_KEYS):
            yield row["key"].encode(), row["hash"]


async def _rows_of(
    table: str, key: Sequence[str], side: Side, rows: RowFilter, wanted: list[str]
) -> dict[str, dict[str, str | None]]:
    names = await side.connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped"
        " ORDER BY attnum",
        f"{quoted(side.schema)}.{quoted(table)}",
    )
    columns = ", ".join(f"t.{quoted(name)}::text AS {quoted(name)}" for (name,) in names)
    parameter = f"${len(rows.arguments) + 1}"
    query = (
        side.select(table, f'{_key_text(key)} AS " key", {columns}', rows) + f" AND {_key_text(key)} = ANY({parameter})"
    )
    found = await side.connection.fetch(query, *rows.arguments, wanted)
    return {row[" key"]: {name: row[name] for (name,) in names} for row in found}


def _key_text(key: Sequence[str]) -> str:
    """The key columns as one text; the whole row if the table has no key."""
    columns = ", ".join(f"t.{quoted(name)}" for name in key) or "t.*"
    return f'(ROW({columns})::text COLLATE "C")'
