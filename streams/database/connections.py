"""Opens connections and pools to the schema of the projections.

Invariant: a pool is only handed out for a schema that has every migration.
"""

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
COMMAND_TIMEOUT_S = 60.0  # a hanging statement is cancelled; the caller retries
IDLE_IN_TRANSACTION_S = 20.0  # Postgres then releases the locks of a suspended process or a lost host


@asynccontextmanager
async def connect_pool(
    postgres: PostgresSettings, schema: str | None = None, *, transaction_timeout_s: float | None = None
) -> AsyncIterator[Pool]:
    """Open a pool whose connections use one schema of projections.

    Args:
        transaction_timeout_s: Postgres aborts a transaction after this time, even if its client hangs.

    Raises:
        NotAllowedError: the database refuses this user.
        UnavailableError: the database does not answer.
        ConfigError: the DSN is malformed, or the schema lacks a migration.
    """
    name = schema or postgres.schema_name
    limits = {"idle_in_transaction_session_timeout": _milliseconds(IDLE_IN_TRANSACTION_S)}
    if transaction_timeout_s is not None:  # a client can also hang while it sends a statement: not idle
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
            raise ConfigError(f"schema {name!r} lacks migrations {', '.join(missing)}: run `esper migrate`")
        yield pool
    finally:
        pool.terminate() if _is_cancelled() else await pool.close()


async def connect(postgres: PostgresSettings, schema: str | None = None) -> Connection:
    """Open one connection without a statement timeout, for work on whole schemas. The caller closes it.

    Args:
        schema: its search path; the database's default search path if None.

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
