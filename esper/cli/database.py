"""Connections of short-lived commands to the projections in Postgres."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from esper.config import load_settings
from esper.streams.database.connections import connect_pool

PROJECTION_TIMEOUT_S = 10.0
"""How long a command waits until a worker has projected the event that it sent."""
POLL_S = 0.1

T = TypeVar("T")


@asynccontextmanager
async def database_connection(schema: str | None = None) -> AsyncIterator[Any]:
    """Connect to the database that the settings name.

    Args:
        schema: a snapshot to read; None reads the live projections.

    Raises:
        ConfigError: the settings name no database, or the schema is not migrated.
        NotAllowedError: the database refuses this user.
        UnavailableError: the database does not answer.
    """
    async with connect_pool(load_settings().need_postgres(), schema) as pool, pool.acquire() as connection:
        yield connection


async def poll_until(read: Callable[[], Awaitable[T]], is_done: Callable[[T], bool], timeout_s: float) -> T:
    """Call ``read`` until ``is_done`` accepts its value or ``timeout_s`` is over. Returns the last value."""
    deadline = time.monotonic() + timeout_s
    while not is_done(value := await read()) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    return value
