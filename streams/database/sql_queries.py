"""The SQL of the projections, by name, from the .sql files beside this module."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import aiosql


@cache
def queries(name: str) -> Any:
    """The queries of ``sql/<name>.sql``, each a coroutine function of (connection, parameters)."""
    text = files("esper.streams").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
    return aiosql.from_str(text, "asyncpg", mandatory_parameters=False)


def by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as the arrays that a query unnests: column -> its values, in the order of the rows.

    The rows are of one kind: each has the columns of the first.
    """
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
