"""Connections to the projections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from esper.config import PostgresSettings
from esper.errors import ConfigError, UnavailableError
from esper.streams.migrations import missing_migrations

CONNECT_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 60.0  # a statement that hangs is given up and tried again


@asynccontextmanager
async def connect_pool(postgres: PostgresSettings, schema: str | None = None) -> AsyncIterator[Any]:
    """A pool whose connections see one schema of projections.

    Raises:
        UnavailableError: the database does not answer.
        ConfigError: the schema is not migrated.
    """
    name = schema or postgres.schema_name
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            pool = await asyncpg.create_pool(
                postgres.dsn.get_secret_value(),
                min_size=1,
                max_size=postgres.pool_size,
                command_timeout=COMMAND_TIMEOUT_S,
                server_settings={"search_path": name, "application_name": "esper"},
            )
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise UnavailableError(
            f"no Postgres answers: {error}; is it running (`esper status`), and is ESPER_POSTGRES__DSN right?"
        ) from error
    try:
        if missing := await missing_migrations(pool):
            raise ConfigError(f"schema {name!r} lacks {', '.join(missing)}: run `esper migrate`")
        yield pool
    finally:
        pool.terminate() if _is_cancelled() else await pool.close()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
