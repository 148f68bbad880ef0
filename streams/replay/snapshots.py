"""Snapshots: the projections as of a time or an offset, each in a separate schema that stays until it is dropped."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from esper.config import PostgresSettings, Settings
from esper.errors import ConfigError, ConflictError
from esper.streams.database.connections import connect
from esper.streams.database.migrations import migrate
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.sql_queries import queries
from esper.streams.replay.cutoff import Cutoff
from esper.streams.replay.replay_log_reader import open_log
from esper.streams.replay.replay_projection import ProgressCallback, ignore_progress
from esper.streams.replay.replay_schemas import (
    BEFORE,
    SNAPSHOT,
    SchemaMark,
    drop_schema,
    exists,
    mark_schema,
    marked_schemas,
)
from esper.streams.replay.replay_session import open_session

NAME_RULE = "a to z, 0 to 9 and _, at most 41 characters, and no digit first"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A schema with earlier rows of the live projections; ``num_bytes`` is its size in Postgres.

    Attributes:
        kind: ``snapshot``, or ``before`` for the rows that a rebuild replaced and kept.
        description: the cutoff of a snapshot, or why a rebuild kept the rows.
    """

    schema: str
    kind: str
    description: str
    is_complete: bool
    num_bytes: int


async def create_snapshot(
    settings: Settings, cutoff: Cutoff, schema: str, on_progress: ProgressCallback = ignore_progress
) -> int:
    """Replay the log up to ``cutoff`` into a new schema; returns the number of projected records.

    Records that have a dead letter today count as skipped, and expired telemetry is missing. If interrupted, the
    schema is dropped; if the process is killed, it stays, marked as incomplete.

    Raises:
        ConflictError: the schema exists.
        ConfigError: the name or the cutoff is invalid.
        NewerVersionError, NotAllowedError, UnavailableError: as ``rebuild``.
    """
    postgres, kafka = settings.need_postgres(), settings.need_kafka()
    _check_name(schema, postgres)
    try:
        async with AsyncExitStack() as exits:
            live = await connect(postgres, postgres.schema_name)
            exits.push_async_callback(live.close)
            reader = await exits.enter_async_context(open_log(kafka))
            ends = await cutoff.ends(reader)
            if await exists(live, schema):
                raise ConflictError(
                    f"schema {schema!r} exists already: run `esper projections drop {schema}`, or choose another name"
                )
            mark = SchemaMark(SNAPSHOT, postgres.schema_name, str(cutoff))
            migrate(postgres, schema)
            try:
                await mark_schema(live, schema, mark)
                async with open_session(settings, live, reader, schema, on_progress) as session:
                    await session.project_to(ends)
                await mark_schema(live, schema, replace(mark, is_complete=True))
            except BaseException:
                await drop_schema(live, schema)
                raise
            return session.projector.num_records
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error


async def list_snapshots(settings: Settings) -> list[Snapshot]:
    """The snapshots of the live projections, and the rows that rebuilds kept."""
    postgres = settings.need_postgres()
    connection = await connect(postgres)
    try:
        marks = await marked_schemas(connection)
        return [
            Snapshot(
                name, m.kind, m.description, m.is_complete, await queries("replay").size_of(connection, schema=name)
            )
            for name, m in marks.items()
            if m.live == postgres.schema_name and m.kind in (SNAPSHOT, BEFORE)
        ]
    finally:
        await connection.close()


async def drop_snapshot(settings: Settings, schema: str) -> None:
    """Drop one schema of ``list_snapshots``; refuses every other one.

    Raises:
        ConfigError: it is not in the list.
        ConflictError: a reader holds a lock on it.
    """
    postgres = settings.need_postgres()
    names = {snapshot.schema for snapshot in await list_snapshots(settings)}
    if schema not in names:
        choice = f"choose one of {', '.join(sorted(names))}" if names else "there are none"
        raise ConfigError(f"{schema!r} is not a snapshot of {postgres.schema_name!r}; {choice}")
    connection = await connect(postgres)
    try:
        await drop_schema(connection, schema)
    finally:
        await connection.close()


def _check_name(name: str, postgres: PostgresSettings) -> None:
    try:
        PostgresSettings.model_validate({"dsn": postgres.dsn, "schema_name": name})
    except ValueError:
        raise ConfigError(f"--into {name!r} is not a valid schema name: use {NAME_RULE}") from None
    if name.startswith((f"{postgres.schema_name}_", "pg_")):
        raise ConfigError(
            f"--into {name!r}: names that start with {postgres.schema_name}_ or pg_ are reserved; choose another name"
        )
