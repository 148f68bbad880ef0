"""Loads the named SQL queries of streams/sql, and quotes identifiers for other statements.

The queries are plain SQL but for one macro. ``INSERT INTO t {rows: a text, b bigint = :c}`` inserts many rows: it
expands to the column list and an ``unnest`` of one array per column, from the parameters ``:a`` and ``:c``.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import aiosql

_ROWS = re.compile(r"\{rows:([^}]*)\}")
_COLUMN = re.compile(r"(?P<name>\w+) (?P<type>[\w ]+?)(?: = :(?P<parameter>\w+))?")


@cache
def queries(name: str) -> Any:
    """The queries of ``sql/<name>.sql``, as functions of a connection and keyword parameters."""
    text = files("esper.streams").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
    return aiosql.from_str(_ROWS.sub(_expand_rows, text), "asyncpg", mandatory_parameters=False)


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Transpose rows into the arrays that a query unnests: column -> values, in the order of the rows.

    Every row must have the columns of the first one.
    """
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _expand_rows(macro: re.Match[str]) -> str:
    columns = [_COLUMN.fullmatch(text.strip()) for text in macro[1].split(",")]
    assert all(columns), f"malformed macro {macro[0]}"
    parsed = [column.groupdict() for column in columns if column]
    names = ", ".join(c["name"] for c in parsed)
    arrays = ", ".join(f":{c['parameter'] or c['name']}::{c['type']}[]" for c in parsed)
    return f"({names}) SELECT * FROM unnest({arrays})"
