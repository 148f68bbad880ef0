"""Reads of the projections: one named statement, one result, through a rebuild or a restart of Postgres.

Owns the retries. A reader meets two transient failures: a rebuild is swapped in (statements and tables are replaced
for a moment), and Postgres is restarted (the pool's connections are dead). A retry resolves both; any other failure
is raised as one of Esper's errors.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from esper.config import PostgresSettings
from esper.errors import UnavailableError
from esper.retry import retry_attempts
from esper.streams.database.connection_types import Pool
from esper.streams.database.postgres_errors import DRIVER_ERRORS, TRANSIENT_ERRORS, postgres_error
from esper.streams.database.sql_queries import queries

MAX_ATTEMPTS = 4
RETRY_S = (0.03, 0.1)  # bounds of the first wait and of every wait; a rebuild swaps its tables in this time
ACQUIRE_TIMEOUT_S = 5.0  # for a free connection of the pool
JSON_COLUMNS = ("spec", "results", "hyperparameters", "metrics", "checks", "measurements")

Row = dict[str, Any]


@cache
def _statement(sql_file: str, name: str) -> tuple[str, tuple[str, ...]]:
    """SQL with $1, $2 ... and the names of its parameters in that order."""
    found = queries(sql_file)
    return getattr(found, name).sql, tuple(found.driver_adapter.var_sorted[name])


class ProjectionReader:
    """Runs the named statements of ``streams/sql``; the caller owns the pool."""

    def __init__(self, pool: Pool, postgres: PostgresSettings) -> None:
        self._pool = pool
        self._postgres = postgres

    async def all(self, name: str, *, sql_file: str = "urza", **parameters: Any) -> list[Row]:
        """All rows of a statement. Columns that hold JSON come as values.

        Raises:
            UnavailableError: Postgres does not answer, or has no free connection.
            NotAllowedError: Postgres refuses this user.
        """
        return [_decode(row) for row in await self._fetch(*_statement(sql_file, name), parameters)]

    async def one(self, name: str, *, sql_file: str = "urza", **parameters: Any) -> Row | None:
        """The first row, or None. Raises as ``all``."""
        rows = await self.all(name, sql_file=sql_file, **parameters)
        return rows[0] if rows else None

    async def _fetch(self, sql: str, names: Sequence[str], parameters: Row) -> Any:
        arguments = [parameters[name] for name in names]
        try:
            async for attempt in retry_attempts(TRANSIENT_ERRORS, MAX_ATTEMPTS, *RETRY_S):
                with attempt:
                    return await self._fetch_once(sql, arguments)
        except (OSError, *DRIVER_ERRORS) as error:
            raise postgres_error(error, self._postgres) from error
        raise AssertionError("the last attempt returns or raises")

    async def _fetch_once(self, sql: str, arguments: Sequence[Any]) -> Any:
        try:
            async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
                return await connection.fetch(sql, *arguments)
        except TimeoutError as error:
            raise UnavailableError(
                f"Postgres: no free connection within {ACQUIRE_TIMEOUT_S:g} s; it is busy or away, try again later"
            ) from error


def _decode(record: Any) -> Row:
    row = dict(record)
    for name in JSON_COLUMNS:
        if (text := row.get(name)) is not None:
            row[name] = json.loads(text)
    return row
