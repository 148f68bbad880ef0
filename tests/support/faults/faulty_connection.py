"""A real connection of asyncpg that fails at the statement it is told to, before or after Postgres did it."""

from collections.abc import Callable
from typing import Any

STATEMENTS = ("execute", "executemany", "fetch", "fetchrow", "fetchval", "copy_records_to_table")


class Crash(Exception):
    """What the fault raises: not one of asyncpg's, so that nothing can take it for a refusal of Postgres."""


class FaultyConnection:
    """Passes everything on to a connection, and fails once.

    Args:
        connection: of asyncpg.
        at: which statement of those to come fails, counted from 0; beginning and committing count as one each.
            None for no fault.
        is_late: the statement is carried out, and its answer lost. Of a commit: the rows are there.
        kill: called before the fault is raised: what else goes with it.
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
        """A transaction whose begin and commit can fail too."""
        return FaultyTransaction(self, self._connection.transaction(**options))

    async def step(self, work: Callable[[], Any]) -> Any:
        """Do one step, or fail in it."""
        if self._left is None:
            return await work()
        self._left -= 1
        if self._left >= 0:
            return await work()
        self._left = None
        if self._is_late:
            await work()
        self._kill()
        raise Crash("the fault that was asked for")


class FaultyTransaction:
    """An ``async with`` block around asyncpg's."""

    def __init__(self, connection: FaultyConnection, transaction: Any) -> None:
        self._connection, self._transaction = connection, transaction
        self._is_open = False

    async def __aenter__(self) -> None:
        try:
            await self._connection.step(self._begin)
        except Crash:
            await self._end()  # it may have begun: a pool ends what a connection brings back
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
