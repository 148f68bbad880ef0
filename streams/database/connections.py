"""Connections to the projections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from esper.config import PostgresSettings
from esper.errors import ConfigError
from esper.streams.database.connection_types import Connection, Pool
from esper.streams.database.migrations import missing_migrations
from esper.streams.database.postgres_errors import CONNECT_ERRORS, database_address, postgres_error

CONNECT_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 60.0  # a statement that hangs is given up and tried again
IDLE_IN_TRANSACTION_S = 20.0  # then Postgres takes its locks from a process that was stopped, or whose host is gone


@asynccontextmanager
async def connect_pool(
    postgres: PostgresSettings, schema: str | None = None, *, transaction_timeout_s: float | None = None
) -> AsyncIterator[Pool]:
    """A pool whose connections see one schema of projections.

    Args:
        transaction_timeout_s: then Postgres ends a transaction, whatever its client does or does not do.

    Raises:
        NotAllowedError: the database refuses this user.
        UnavailableError: the database does not answer.
        ConfigError: the DSN cannot be read, or the schema is not migrated.
    """
    name = schema or postgres.schema_name
    limits = {"idle_in_transaction_session_timeout": _milliseconds(IDLE_IN_TRANSACTION_S)}
    if transaction_timeout_s is not None:  # an idle one is not all: a client may also stop amid a statement's messages
        limits["transaction_timeout"] = _milliseconds(transaction_timeout_s)
    address = database_address(postgres)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            pool = await asyncpg.create_pool(
                address.dsn,
                min_size=1,
                max_size=postgres.pool_size,
                command_timeout=COMMAND_TIMEOUT_S,
                server_settings={"search_path": name, "application_name": "esper", **limits},
            )
    except CONNECT_ERRORS as error:
        raise postgres_error(error, postgres) from error
    try:
        if missing := await missing_migrations(pool):
            raise ConfigError(f"schema {name!r} lacks {', '.join(missing)}: run `esper migrate`")
        yield pool
    finally:
        pool.terminate() if _is_cancelled() else await pool.close()


async def connect(postgres: PostgresSettings, schema: str | None = None) -> Connection:
    """One connection without a time limit, for work on whole schemas. The caller closes it.

    Args:
        schema: the one that it sees; the database's own search path where it is None.

    Raises:
        NotAllowedError, UnavailableError, ConfigError: as ``connect_pool``.
    """
    try:
        return await asyncpg.connect(
            database_address(postgres).dsn,
            timeout=CONNECT_TIMEOUT_S,
            server_settings={"application_name": "esper", **({"search_path": schema} if schema else {})},
        )
    except CONNECT_ERRORS as error:
        raise postgres_error(error, postgres) from error


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
