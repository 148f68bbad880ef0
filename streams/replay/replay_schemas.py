"""Schemas beside the live one: a rebuild's, a verify's, and pasts that stay.

Invariant: one rebuild or verify of a live schema runs at a time; a schema is dropped only if its name is that of a
replay's own, or if it carries Esper's mark.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from esper.config import PostgresSettings
from esper.errors import ConfigError, ConflictError
from esper.retry import retry_attempts
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect
from esper.streams.database.migrations import migrate, missing_migrations
from esper.streams.database.postgres_errors import LOCK_ERRORS
from esper.streams.database.sql_queries import queries

MARK = "esper projections"
DROP_LOCK_TIMEOUT_MS = 500  # shorter than Postgres's own check for deadlocks (1 s), which could hit a reader
DROP_TRIES = 20

SCRATCH, REPLACED, PAST, BEFORE = "scratch", "replaced", "past", "before"
"""What a schema is for: being folded; given way, to be dropped; the past beside the present; kept, as it was before."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a schema beside the live one is, kept as its comment in Postgres.

    Attributes:
        told: for people: up to where it was folded, or why it was kept.
    """

    kind: str
    live: str
    told: str = ""
    is_complete: bool = False


def quoted(name: str) -> str:
    """An identifier for SQL."""
    return '"' + name.replace('"', '""') + '"'


@asynccontextmanager
async def only_replay(postgres: PostgresSettings) -> AsyncIterator[Connection]:
    """A connection to the live schema that holds the right to replay; the right ends with the process.

    Raises:
        ConflictError: another one has it.
        ConfigError: the live schema is not migrated.
        NotAllowedError, UnavailableError: as ``connect``.
    """
    name = postgres.schema_name
    connection = await connect(postgres, name)
    try:
        if missing := await missing_migrations(connection):
            raise ConfigError(f"schema {name!r} lacks {', '.join(missing)}: run `esper migrate`")
        if not await connection.fetchval("SELECT pg_try_advisory_lock(hashtext($1))", f"{name} is replayed"):
            raise ConflictError(f"another rebuild or verify of {name!r} is under way: wait for its end")
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def scratch_schema(postgres: PostgresSettings, connection: Connection) -> AsyncIterator[str]:
    """An empty, migrated schema, gone at the end unless it was renamed. What a killed replay left goes first."""
    name = f"{postgres.schema_name}_rebuild"
    for left in (name, f"{postgres.schema_name}_verify", f"{postgres.schema_name}_{REPLACED}"):
        await drop_schema(connection, left)
    await asyncio.to_thread(migrate, postgres, name)
    try:
        await mark_schema(connection, name, Mark(SCRATCH, postgres.schema_name))
        yield name
    finally:
        await drop_schema(connection, name)


async def mark_schema(connection: Connection, schema: str, mark: Mark) -> None:
    """Write what a schema is."""
    told = {"is": MARK, "kind": mark.kind, "live": mark.live, "told": mark.told, "complete": mark.is_complete}
    await _comment(connection, schema, json.dumps(told))


async def unmark_schema(connection: Connection, schema: str) -> None:
    """Make it a schema like any other."""
    await _comment(connection, schema, None)


async def marked_schemas(connection: Connection) -> dict[str, Mark]:
    """Every schema of the database that carries a mark, by name."""
    rows = await connection.fetch(
        "SELECT nspname, obj_description(oid, 'pg_namespace') AS told FROM pg_namespace ORDER BY nspname"
    )
    return {row["nspname"]: mark for row in rows if (mark := _read_mark(row["told"])) is not None}


async def exists(connection: Connection, schema: str) -> bool:
    """Whether there is a schema of that name, whoever's it is."""
    return await connection.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = $1", schema) is not None


async def drop_schema(connection: Connection, schema: str) -> None:
    """Drop it if it is there, without ever making a reader wait for long.

    Raises:
        ConflictError: a reader holds on to it.
    """
    pause_s = DROP_LOCK_TIMEOUT_MS / 1000
    try:
        async for attempt in retry_attempts(LOCK_ERRORS, DROP_TRIES, pause_s, pause_s):
            with attempt:
                async with connection.transaction():
                    await connection.execute(f"SET LOCAL lock_timeout = {DROP_LOCK_TIMEOUT_MS}")
                    await connection.execute(f"DROP SCHEMA IF EXISTS {quoted(schema)} CASCADE")
    except LOCK_ERRORS as error:
        raise ConflictError(
            f"schema {schema!r} cannot be dropped: a long transaction reads it; the next rebuild drops it"
        ) from error


async def copy_rights(connection: Connection, source: str, target: str) -> None:
    """Give ``target`` and its tables the owners and the grants of ``source``, so that a swap changes no one's rights.

    Raises:
        asyncpg.InsufficientPrivilegeError: this user may not hand tables to their owner.
    """
    rows = queries("replay").statements_for_rights(connection, source=source, target=target)
    for statement in [row["statement"] async for row in rows]:
        await connection.execute(statement)


async def _comment(connection: Connection, schema: str, text: str | None) -> None:
    statement = await connection.fetchval(
        "SELECT format('COMMENT ON SCHEMA %I IS %L', $1::text, $2::text)", schema, text
    )
    await connection.execute(statement)


def _read_mark(text: str | None) -> Mark | None:
    try:
        told = json.loads(text or "")
        return Mark(told["kind"], told["live"], told["told"], told["complete"]) if told["is"] == MARK else None
    except (ValueError, KeyError, TypeError):
        return None  # somebody else's comment
