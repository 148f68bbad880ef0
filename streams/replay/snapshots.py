"""Pasts: the projections as they were, folded into schemas that stay beside the live one until they are dropped."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from esper.config import PostgresSettings, Settings
from esper.errors import ConfigError, ConflictError
from esper.oona.admin.topics import cluster_id
from esper.streams.database.connections import connect
from esper.streams.database.migrations import migrate
from esper.streams.database.postgres_errors import UNAVAILABLE_ERRORS, postgres_error
from esper.streams.database.sql_queries import queries
from esper.streams.database.stored_positions import claim_cluster
from esper.streams.replay.cutoff import Cutoff
from esper.streams.replay.replay_log_reader import open_log
from esper.streams.replay.replay_projection import ProgressCallback, ignore_progress, open_replay_projector
from esper.streams.replay.replay_schemas import BEFORE, PAST, Mark, drop_schema, exists, mark_schema, marked_schemas
from esper.streams.replay.skipped_records import SkippedRecords

NAME = "a to z, 0 to 9 and _, not beginning with a number, at most 41 of them"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A schema that holds the past of the live one. ``num_bytes`` is what it takes in Postgres."""

    schema: str
    kind: str
    told: str
    is_complete: bool
    num_bytes: int


async def create_snapshot(
    settings: Settings, until: Cutoff, into: str, tell: ProgressCallback = ignore_progress
) -> int:
    """Fold the log up to ``until`` into the schema ``into``, which must not be there yet. Gives the records folded.

    It is folded as workers read it: what has a dead letter today counts as passed over. Telemetry that has expired
    is missing in it. Interrupted, it is dropped; killed, it stays, shown as incomplete.

    Raises:
        ConflictError: there is such a schema.
        ConfigError: the name or ``until`` cannot be.
        NewerVersionError, NotAllowedError, UnavailableError: as ``rebuild``.
    """
    postgres, kafka = settings.need_postgres(), settings.need_kafka()
    _check_name(into, postgres)
    try:
        async with AsyncExitStack() as exits:
            connection = await connect(postgres, postgres.schema_name)
            exits.push_async_callback(connection.close)
            reader = await exits.enter_async_context(open_log(kafka))
            ends = await until.ends(reader)
            if await exists(connection, into):
                raise ConflictError(
                    f"there is a schema {into!r} already: `esper projections drop {into}`, or choose another name"
                )
            mark = Mark(PAST, postgres.schema_name, str(until))
            migrate(postgres, into)
            try:
                await mark_schema(connection, into, mark)
                async with open_replay_projector(postgres, into, reader, tell) as projector:
                    await claim_cluster(projector.connection, await cluster_id(kafka), kafka)
                    letters = SkippedRecords(reader, projector.first)
                    await letters.refresh(connection)
                    await letters.record_expired(projector.connection)
                    await projector.replay_to(ends, letters.known)
                await mark_schema(connection, into, replace(mark, is_complete=True))
            except BaseException:
                await drop_schema(connection, into)
                raise
            return projector.num_records
    except UNAVAILABLE_ERRORS as error:
        raise postgres_error(error, postgres) from error


async def list_snapshots(settings: Settings) -> list[Snapshot]:
    """Every past of the live projections, and what rebuilds kept from before them."""
    postgres = settings.need_postgres()
    connection = await connect(postgres)
    try:
        marks = await marked_schemas(connection)
        mine = {name: m for name, m in marks.items() if m.live == postgres.schema_name and m.kind in (PAST, BEFORE)}
        return [
            Snapshot(name, m.kind, m.told, m.is_complete, await queries("replay").size_of(connection, schema=name))
            for name, m in mine.items()
        ]
    finally:
        await connection.close()


async def drop_snapshot(settings: Settings, name: str) -> None:
    """Drop one of ``pasts``.

    Raises:
        ConfigError: it is none; nothing else is ever dropped.
        ConflictError: somebody reads it.
    """
    postgres = settings.need_postgres()
    known = {past.schema for past in await list_snapshots(settings)}
    if name not in known:
        there_are = f"there are {', '.join(sorted(known))}" if known else "there is none"
        raise ConfigError(f"{name!r} is no past of {postgres.schema_name!r}; {there_are}")
    connection = await connect(postgres)
    try:
        await drop_schema(connection, name)
    finally:
        await connection.close()


def _check_name(name: str, postgres: PostgresSettings) -> None:
    try:
        PostgresSettings.model_validate({"dsn": postgres.dsn, "schema_name": name})
    except ValueError:
        raise ConfigError(f"--into {name!r} is no name for a schema: write {NAME}") from None
    if name.startswith((f"{postgres.schema_name}_", "pg_")):
        raise ConfigError(f"--into {name!r}: names that begin with {postgres.schema_name}_ or pg_ are taken")
