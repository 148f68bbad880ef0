"""Inserts that a projector collects over a batch, and executes with one statement per query."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import by_column


class BatchedInserts:
    """Rows by the name of the query that inserts them, in log order.

    The queries ignore a key that exists: the first row counts.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[Mapping[str, Any]]] = {}

    def add(self, query: str, *rows: Mapping[str, Any]) -> None:
        """Add rows for ``query``; all rows of a query must have the same columns."""
        self._rows.setdefault(query, []).extend(rows)

    async def execute(self, connection: Connection, sql: Any) -> None:
        """Execute the inserts with the queries ``sql``."""
        for query, rows in self._rows.items():
            await write_rows(connection, sql, query, rows)


async def write_rows(connection: Connection, sql: Any, query: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Execute a query once for all rows; not at all without rows."""
    if rows:
        await getattr(sql, query)(connection, **by_column(rows))
