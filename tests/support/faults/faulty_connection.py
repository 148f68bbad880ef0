"""A real asyncpg connection that fails at a chosen statement, before or after Postgres executes it."""

from collections.abc import Callable
from typing import Any

STATEMENTS = ("execute", "executemany", "fetch", "fetchrow", "fetchval", "copy_records_to_table")


class Crash(Exception):
    """Raised by the fault. Not an error of asyncpg, so that no code mistakes it for a failure of Postgres."""


class FaultyConnection:
    """Forwards every call to a connection, and fails once.

    Args:
        connection: a connection of asyncpg.
        at: index from 0 of the statement that fails; BEGIN and COMMIT count as statements. None injects no fault.
        is_late: the statement is executed and its response is lost. After a COMMIT the rows are stored.
        kill: called before the error is raised, to lose more than the statement.
    """

    def __init__(
        self, connection: Any, at: int | None, *, is_late: bool = False, kill: Callable[[], None] = lambda: None
    ) -> None:
        self._connection = connection
        self._left = at
        self._is_late = is_late
        self._kill = kill

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._connection, name)
        if name not in STATEMENTS:
            return value

        async def statement(*args: Any, **kwargs: Any) -> Any:
            return await self.step(lambda: value(*args, **kwargs))

        return statement

    def transaction(self, **options: Any) -> "FaultyTransaction":
        """A transaction whose BEGIN and COMMIT can fail too."""
        return FaultyTransaction(self, self._connection.transaction(**options))

    async def step(self, work: Callable[[], Any]) -> Any:
        """Execute one statement, or fail at it."""
        if self._left is None:
            return await work()
        self._left -= 1
        if self._left >= 0:
            return await work()
        self._left = None
        if self._is_late:
            await work()
        self._kill()
        raise Crash("injected fault")


class FaultyTransaction:
    """A transaction of asyncpg's as an ``async with`` block."""

    def __init__(self, connection: FaultyConnection, transaction: Any) -> None:
        self._connection, self._transaction = connection, transaction
        self._is_open = False

    async def __aenter__(self) -> None:
        try:
            await self._connection.step(self._begin)
        except Crash:
            await self._end()  # it may have begun; a pool would roll back whatever a returned connection has open
            raise

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> None:
        try:
            if error is None:
                await self._connection.step(self._commit)
        finally:
            await self._end()

    async def _begin(self) -> None:
        await self._transaction.start()
        self._is_open = True

    async def _end(self) -> None:
        if self._is_open and not self._connection.is_closed():
            self._is_open = False
            await self._transaction.rollback()

    async def _commit(self) -> None:
        self._is_open = False
        await self._transaction.commit()
