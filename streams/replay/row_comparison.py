"""Compares the live rows with rebuilt ones: table by table by a digest, and row by row where that differs.

A digest is the number of rows and the sums of two 64-bit hashes of each row's text: it does not depend on the
order of the rows, needs no memory, and one altered bit in one row changes it.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.replay.expired_ranges import ALL_ROWS, Compared, Rows
from esper.streams.replay.replay_schemas import quoted

NOT_COMPARED = ("cluster", "pending_letters", "_yoyo_log", "_yoyo_migration", "_yoyo_version", "yoyo_lock")
"""What is no projection."""

FETCHED_KEYS = 2_000


@dataclass(frozen=True, slots=True)
class RowDifference:
    """One row: ``live`` and ``rebuilt`` hold its columns by name, None where it is missing."""

    key: str
    live: dict[str, str | None] | None
    rebuilt: dict[str, str | None] | None

    @property
    def columns(self) -> list[str]:
        """Those that differ; all of a row that one side lacks."""
        if self.live is None or self.rebuilt is None:
            return sorted(self.live or self.rebuilt or {})
        return [name for name, value in self.live.items() if value != self.rebuilt.get(name)]


@dataclass(frozen=True, slots=True)
class TableComparison:
    """One table. ``live`` and ``rebuilt`` are (rows, digest of all rows) as far as they were compared.

    Attributes:
        differences: the first few rows that differ, in the order of their keys, where they were asked for.
    """

    table: str
    live: tuple[int, str]
    rebuilt: tuple[int, str]
    differences: tuple[RowDifference, ...] = field(default=())

    @property
    def is_equal(self) -> bool:
        """Whether they hold the same rows."""
        return self.live == self.rebuilt


@dataclass(frozen=True, slots=True)
class Side:
    """Rows to compare: a connection, inside the transaction whose view counts, and the schema they are in."""

    connection: Connection
    schema: str

    def select(self, table: str, columns: str, rows: Rows) -> str:
        """A query on a table's compared rows, which are ``t`` in it."""
        return f"SELECT {columns} FROM {quoted(self.schema)}.{quoted(table)} AS t WHERE {rows.condition}"


async def tables_of(side: Side) -> list[str]:
    """The projections of a schema, the partitioned ones last."""
    rows = queries("replay").tables_of(side.connection, schema=side.schema)
    return [row["name"] async for row in rows if row["name"] not in NOT_COMPARED]


async def compare(table: str, live: Side, rebuilt: Side, compared: Compared, num_shown: int) -> TableComparison:
    """Compare the rows of one table that both sides can have.

    Args:
        compared: which rows these are.
        num_shown: how many differing rows to find, at most.
    """
    of_live, of_rebuilt = compared.live.get(table, ALL_ROWS), compared.rebuilt.get(table, ALL_ROWS)
    found = await _digest(live, table, of_live), await _digest(rebuilt, table, of_rebuilt)
    if found[0] == found[1] or num_shown == 0:
        return TableComparison(table, *found)
    shown = await _differences(table, (live, of_live), (rebuilt, of_rebuilt), num_shown)
    return TableComparison(table, *found, tuple(shown))


async def _digest(side: Side, table: str, rows: Rows) -> tuple[int, str]:
    await _set_forms(side.connection)
    hashes = (
        'count(*), coalesce(sum(hashtextextended(t::text COLLATE "C", 0)), 0),'
        ' coalesce(sum(hashtextextended(t::text COLLATE "C", 1)), 0)'
    )
    (found,) = await side.connection.fetch(side.select(table, hashes, rows), *rows.arguments)
    number, first, second = found
    return number, f"{first}:{second}"


async def _set_forms(connection: Connection) -> None:
    """Rows are compared as text: the same settings give the same text on both sides."""
    await connection.execute(
        "SET timezone = 'UTC'; SET datestyle = 'ISO'; SET intervalstyle = 'iso_8601'; SET bytea_output = 'hex';"
        " SET extra_float_digits = 1"
    )


async def _differences(
    table: str, live: tuple[Side, Rows], rebuilt: tuple[Side, Rows], limit: int
) -> list[RowDifference]:
    key = [
        row["name"] async for row in queries("replay").key_of(live[0].connection, schema=live[0].schema, table=table)
    ]
    wanted = await _differing_keys(table, key, live, rebuilt, limit)
    sides = [await _rows_of(table, key, side, rows, wanted) for side, rows in (live, rebuilt)]
    return [RowDifference(k, sides[0].get(k), sides[1].get(k)) for k in wanted]


async def _differing_keys(
    table: str, key: Sequence[str], live: tuple[Side, Rows], rebuilt: tuple[Side, Rows], limit: int
) -> list[str]:
    """Walk both sides in the order of the keys, side by side."""
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


async def _hashes(table: str, key: Sequence[str], side: Side, rows: Rows) -> Any:
    """(key as UTF-8, hash of the row), in the order of the keys' bytes."""
    columns = f'{_key_text(key)} AS key, hashtextextended(t::text COLLATE "C", 0) AS hash'
    query = side.select(table, columns, rows) + " ORDER BY 1"
    async with side.connection.transaction():
        async for row in side.connection.cursor(query, *rows.arguments, prefetch=FETCHED_KEYS):
            yield row["key"].encode(), row["hash"]


async def _rows_of(
    table: str, key: Sequence[str], side: Side, rows: Rows, wanted: list[str]
) -> dict[str, dict[str, str | None]]:
    names = await side.connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped"
        " ORDER BY attnum",
        f"{quoted(side.schema)}.{quoted(table)}",
    )
    columns = ", ".join(f"t.{quoted(name)}::text AS {quoted(name)}" for (name,) in names)
    place = f"${len(rows.arguments) + 1}"
    query = side.select(table, f'{_key_text(key)} AS " key", {columns}', rows) + f" AND {_key_text(key)} = ANY({place})"
    found = await side.connection.fetch(query, *rows.arguments, wanted)
    return {row[" key"]: {name: row[name] for (name,) in names} for row in found}


def _key_text(key: Sequence[str]) -> str:
    """The key's columns as one text; the whole row of a table without one."""
    columns = ", ".join(f"t.{quoted(name)}" for name in key) or "t.*"
    return f'(ROW({columns})::text COLLATE "C")'


async def compare_all(live: Side, rebuilt: Side, compared: Compared, num_shown: int) -> AsyncIterator[TableComparison]:
    """Every table that either side has."""
    names = list(dict.fromkeys([*await tables_of(live), *await tables_of(rebuilt)]))
    for table in names:
        yield await compare(table, live, rebuilt, compared, num_shown)
