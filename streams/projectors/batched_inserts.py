"""Facts on their way into tables: collected from a batch, written at its end with one statement a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import by_column


class BatchedInserts:
    """Rows by the name of the query that inserts them, in the order of the log.

    A query that meets the same key twice keeps the first: what it writes are facts.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[Mapping[str, Any]]] = {}

    def add(self, query: str, *rows: Mapping[str, Any]) -> None:
        """Rows for ``query``; each has the same columns as the others of that query."""
        self._rows.setdefault(query, []).extend(rows)

    async def write(self, connection: Connection, sql: Any) -> None:
        """Write everything; ``sql`` are the queries of one file."""
        for query, rows in self._rows.items():
            await write_rows(connection, sql, query, rows)


async def write_rows(connection: Connection, sql: Any, query: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One statement for all rows, none where there are none."""
    if rows:
        await getattr(sql, query)(connection, **by_column(rows))
