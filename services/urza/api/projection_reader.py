"""The projections as the API reads them: one statement, one answer, through a swap or a restart.

Owns the retries. A reader meets two things that are nobody's fault: a rebuild that is swapped in
(statements and tables are others for a moment), and a Postgres that was restarted (connections of
the pool are dead). Both pass with a fresh try; what does not pass is one ``UnavailableError``.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import asyncpg

from esper.config import PostgresSettings
from esper.errors import UnavailableError
from esper.streams.database.connection_types import Pool
from esper.streams.database.postgres_errors import postgres_error
from esper.streams.database.sql_queries import queries

TRIES = 4
PAUSE_S = 0.05
ACQUIRE_S = 5.0  # for a free connection; then the caller is told to come again
VERSION_AGE_S = 0.01  # how old the positions may be that a cached answer is judged by
JSON_COLUMNS = ("spec", "results", "hyperparameters", "metrics", "checks", "measurements")
PASSING = (
    asyncpg.InvalidCachedStatementError,  # a rebuild was swapped in
    asyncpg.UndefinedTableError,
    asyncpg.InternalServerError,  # "could not open relation with OID"
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.InterfaceError,
    OSError,
)

Row = dict[str, Any]


@cache
def _statement(room: str, name: str) -> tuple[str, tuple[str, ...]]:
    """SQL with $1, $2 ... and the names of its parameters in that order."""
    found = queries(room)
    return getattr(found, name).sql, tuple(found.driver_adapter.var_sorted[name])


class Rows:
    """Named statements of ``streams/sql``, on a pool that somebody else opened."""

    def __init__(self, pool: Pool, postgres: PostgresSettings) -> None:
        self._pool = pool
        self._postgres = postgres

    async def all(self, name: str, *, room: str = "urza", **parameters: Any) -> list[Row]:
        """The rows of a statement.

        Raises:
            UnavailableError, NotAllowedError: Postgres is away, busy, or refuses.
        """
        return [_shown(row) for row in await self._fetch(*_statement(room, name), parameters)]

    async def one(self, name: str, *, room: str = "urza", **parameters: Any) -> Row | None:
        """The first row, if there is one. Raises as ``all``."""
        found = await self.all(name, room=room, **parameters)
        return found[0] if found else None

    async def _fetch(self, sql: str, names: Sequence[str], parameters: Row) -> Any:
        arguments = [parameters[name] for name in names]
        for tried in range(1, TRIES + 1):
            try:
                async with self._pool.acquire(timeout=ACQUIRE_S) as connection:
                    return await connection.fetch(sql, *arguments)
            except TimeoutError as error:
                raise UnavailableError("Postgres is busy or away: come again") from error
            except PASSING as error:
                if tried == TRIES:
                    raise postgres_error(error, self._postgres) from error
                await asyncio.sleep(PAUSE_S * (tried - 1))
            except asyncpg.PostgresError as error:
                raise postgres_error(error, self._postgres) from error
        raise AssertionError("the last try returns or raises")


class Versions:
    """How far each topic is folded: what was read of it is the same while this is.

    One look serves all who ask within VERSION_AGE_S. A change that this process waited for makes
    the next look a new one, so whoever asked for it sees it.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._known: dict[str, tuple[int, int]] = {}
        self._looked_at = self._not_before = float("-inf")
        self._look: asyncio.Task[None] | None = None

    @property
    def known(self) -> Mapping[str, tuple[int, int]]:
        """What the newest look found, however old it is."""
        return self._known

    def is_recent(self, began: float, asked_at: float) -> bool:
        """Whether what was read from ``began`` on is as good as new to who asked at ``asked_at``."""
        return began >= max(asked_at - VERSION_AGE_S, self._not_before)

    async def of(self, topics: Sequence[str]) -> tuple[Any, ...]:
        """A value that changes with the rows of these topics. Raises as ``Rows.all``."""
        wanted = time.monotonic() - VERSION_AGE_S
        while self._looked_at < max(wanted, self._not_before):
            if self._look is None or self._look.done():
                self._look = asyncio.create_task(self._refresh(), name="urza-versions")
            await asyncio.shield(self._look)
        return tuple(self._known.get(topic) for topic in topics)

    def expire(self) -> None:
        """Take no look for an answer that began before now."""
        self._not_before = time.monotonic()

    async def _refresh(self) -> None:
        began = time.monotonic()
        found = await self._rows.all("versions")
        self._known = {r["topic"]: (r["made_in"], r["folded"]) for r in found}
        self._looked_at = began


def _shown(record: Any) -> Row:
    row = dict(record)
    for name in JSON_COLUMNS:
        if (text := row.get(name)) is not None:
            row[name] = json.loads(text)
    return row
