"""The schemas besides the live one: the scratch schema of a replay, snapshots, and rows that a rebuild replaced.

Owns their creation, marks, locks, privileges and removal. Invariants: one rebuild or verification of a live schema
runs at a time; only schemas with a replay's name or with Esper's mark are dropped.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from esper.config import PostgresSettings
from esper.errors import ConfigError, ConflictError
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect
from esper.streams.database.migrations import migrate, missing_migrations
from esper.streams.database.postgres_errors import LOCK_ERRORS
from esper.streams.database.sql_queries import queries, quoted

MARK = "esper projections"
DROP_LOCK_TIMEOUT_MS = 500  # shorter than Postgres' deadlock check (1 s), which could abort a reader
DROP_TRIES = 20

SCRATCH, REPLACED, SNAPSHOT, BEFORE = "scratch", "replaced", "snapshot", "before"
"""Kinds of schemas: being projected; replaced, to be dropped; a snapshot; replaced and kept."""


@dataclass(frozen=True, slots=True)
class SchemaMark:
    """The description of a schema other than the live one, stored as its comment in Postgres.

    Attributes:
        live: the name of the live schema.
        description: for operators: the cutoff of a snapshot, or why the schema was kept.
    """

    kind: str
    live: str
    description: str = ""
    is_complete: bool = False


@asynccontextmanager
async def lock_replay(postgres: PostgresSettings) -> AsyncIterator[Connection]:
    """Open a connection to the live schema that locks out other replays; the lock ends with the process.

    Raises:
        ConflictError: another replay holds the lock.
        ConfigError: the live schema lacks a migration.
        NotAllowedError, UnavailableError: as ``connect``.
    """
    name = postgres.schema_name
    connection = await connect(postgres, name)
    try:
        if missing := await missing_migrations(connection):
            raise ConfigError(f"schema {name!r} lacks migrations {', '.join(missing)}: run `esper migrate`")
        if not await connection.fetchval("SELECT pg_try_advisory_lock(hashtext($1))", f"{name} is replayed"):
            raise ConflictError(f"another rebuild or verification of {name!r} is running: wait for its end")
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def scratch_schema(postgres: PostgresSettings, connection: Connection) -> AsyncIterator[str]:
    """Create an empty, migrated schema; drops it at the end unless it was renamed, and what a killed replay left."""
    name = f"{postgres.schema_name}_rebuild"
    for leftover in (name, f"{postgres.schema_name}_verify", f"{postgres.schema_name}_{REPLACED}"):
        await drop_schema(connection, leftover)
    await asyncio.to_thread(migrate, postgres, name)
    try:
        await mark_schema(connection, name, SchemaMark(SCRATCH, postgres.schema_name))
        yield name
    finally:
        await drop_schema(connection, name)


async def mark_schema(connection: Connection, schema: str, mark: SchemaMark) -> None:
    """Store a mark as the comment of a schema."""
    text = json.dumps(
        {
            "is": MARK,
            "kind": mark.kind,
            "live": mark.live,
            "description": mark.description,
            "complete": mark.is_complete,
        }
    )
    statement = await connection.fetchval(
        "SELECT format('COMMENT ON SCHEMA %I IS %L', $1::text, $2::text)", schema, text
    )
    await connection.execute(statement)


async def marked_schemas(connection: Connection) -> dict[str, SchemaMark]:
    """Every schema of the database that carries a mark, sorted by name."""
    rows = await connection.fetch(
        "SELECT nspname, obj_description(oid, 'pg_namespace') AS comment FROM pg_namespace ORDER BY nspname"
    )
    return {row["nspname"]: mark for row in rows if (mark := _parse_mark(row["comment"])) is not None}


async def exists(connection: Connection, schema: str) -> bool:
    """Whether a schema of that name exists, marked or not."""
    return await connection.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = $1", schema) is not None


async def drop_schema(connection: Connection, schema: str) -> None:
    """Drop a schema if it exists. Retries with a short lock timeout, so that no reader waits for long.

    Raises:
        ConflictError: a reader holds a lock on it.
    """
    for _n in range(DROP_TRIES):
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {DROP_LOCK_TIMEOUT_MS}")
                await connection.execute(f"DROP SCHEMA IF EXISTS {quoted(schema)} CASCADE")
        except LOCK_ERRORS:
            await asyncio.sleep(DROP_LOCK_TIMEOUT_MS / 1000)
        else:
            return
    raise ConflictError(
        f"schema {schema!r} cannot be dropped: a long transaction reads it; end that transaction, or let the next "
        "rebuild drop it"
    )


async def copy_privileges(connection: Connection, source: str, target: str) -> None:
    """Give ``target`` and its tables the owners and grants of ``source``, so that a swap changes no access.

    Raises:
        asyncpg.InsufficientPrivilegeError: this user may not change the owner of a table.
    """
    rows = queries("replay").grant_statements(connection, source=source, target=target)
    for statement in [row["statement"] async for row in rows]:
        await connection.execute(statement)


def _parse_mark(comment: str | None) -> SchemaMark | None:
    try:
        found = json.loads(comment or "")
        if found["is"] != MARK:
            return None
        return SchemaMark(found["kind"], found["live"], found["description"], found["complete"])
    except (ValueError, KeyError, TypeError):
        return None  # another program's comment
