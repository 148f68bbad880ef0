"""Applies migrations to a schema: ``esper migrate``."""

import logging
from importlib.resources import as_file, files

import psycopg
from psycopg import sql

from esper.config import PostgresSettings
from esper.streams.database.connection_types import Connection, Pool
from esper.streams.database.postgres_errors import database_address, postgres_error
from esper.streams.database.roles import grant

CONNECT_TIMEOUT_S = 10


def migrate(postgres: PostgresSettings, schema: str | None = None) -> list[str]:
    """Create the schema if needed, apply the missing migrations, and grant the roles their privileges.

    Args:
        schema: the schema of a replay; the live one if None.

    Returns:
        The names of the applied migrations, in order.

    Raises:
        NotAllowedError: the database refuses this user, or the user lacks a privilege.
        UnavailableError: the database does not answer.
        ConfigError: the DSN is malformed, or the database does not exist.
    """
    import yoyo

    logging.getLogger("yoyo").setLevel(logging.WARNING)
    name = schema or postgres.schema_name
    dsn = database_address(postgres).dsn
    try:
        with psycopg.connect(dsn, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S) as connection:
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(name)))
        backend = yoyo.get_backend(_with_schema(dsn, name))
        with backend, as_file(files("esper.streams").joinpath("migrations_sql")) as folder:
            wanted = backend.to_apply(yoyo.read_migrations(str(folder)))
            with backend.lock():
                backend.apply_migrations(wanted)
        with psycopg.connect(dsn, connect_timeout=CONNECT_TIMEOUT_S) as connection:
            grant(connection, name)
        return [m.id for m in wanted]
    except (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege) as error:
        raise postgres_error(error, postgres) from error


async def missing_migrations(connection: Connection | Pool) -> list[str]:
    """The migrations that the schema of a connection lacks, in order; all of them if it is empty."""
    folder = files("esper.streams").joinpath("migrations_sql")
    wanted = sorted(f.name.removesuffix(".sql") for f in folder.iterdir() if f.name.endswith(".sql"))
    if await connection.fetchval("SELECT to_regclass('_yoyo_migration')") is None:
        return wanted
    rows = await connection.fetch("SELECT migration_id FROM _yoyo_migration")
    return sorted(set(wanted) - {row["migration_id"] for row in rows})


def _with_schema(dsn: str, schema: str) -> str:
    scheme, rest = dsn.split("://", 1)
    separator = "&" if "?" in rest else "?"
    return f"{scheme}+psycopg://{rest}{separator}schema={schema}"
