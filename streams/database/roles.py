"""Postgres roles: two group roles and their privileges on a schema of projections.

Owns the grants. ``esper_writer`` is for workers, ``esper_reader`` for Urza and Tamiyo. The user that migrates and
rebuilds owns the schemas and is in neither group. ``migrate`` grants again each time, so that a rebuilt schema has
the privileges of the one that it replaces.

Workers create and drop the daily partitions of ``health_windows``, which Postgres allows only to the table's owner.
So the writer group owns this one table and may create in the schema; it can neither drop nor alter the schema or
another table. A writer's sessions run as the group, or a partition would belong to a single worker's user.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import psycopg
from psycopg import sql
from pydantic import SecretStr

from esper.config import PostgresSettings
from esper.errors import ConfigError
from esper.streams.database.health_window_partitions import TABLE as PARTITIONED
from esper.streams.database.postgres_errors import database_address, postgres_error
from esper.streams.database.sql_queries import quoted

CONNECT_TIMEOUT_S = 10


class DatabaseRole(StrEnum):
    """A group role."""

    READER = "reader"
    WRITER = "writer"

    @property
    def group(self) -> str:
        """The name of the role in Postgres."""
        return f"esper_{self.value}"


PRIVILEGES = {
    DatabaseRole.READER: ("SELECT",),
    DatabaseRole.WRITER: ("SELECT", "INSERT", "UPDATE", "DELETE"),
}
"""Privileges on every table of the schema."""


@dataclass(frozen=True, slots=True)
class Member:
    """A user in a group role."""

    role: DatabaseRole
    user: str
    can_login: bool


def apply_roles(postgres: PostgresSettings) -> list[DatabaseRole]:
    """Create the missing group roles, and grant their privileges on the live schema.

    Returns:
        The created roles.

    Raises:
        NotAllowedError: this user may not create roles, or does not own the schema.
        UnavailableError, ConfigError: as ``migrate``; ConfigError also if the schema does not exist.
    """
    with _connected(postgres) as connection:
        exists = connection.execute("SELECT to_regnamespace(%s) IS NOT NULL", (quoted(postgres.schema_name),))
        if exists.fetchone() != (True,):
            raise ConfigError(f"schema {postgres.schema_name!r} does not exist: run `esper migrate`")
        missing = [role for role in DatabaseRole if role not in _existing_roles(connection)]
        for role in missing:
            connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(role.group)))
        grant(connection, postgres.schema_name)
    return missing


def grant(connection: psycopg.Connection[Any], schema: str) -> None:
    """Grant the existing group roles their privileges on a schema, in the caller's transaction if there is one."""
    existing = _existing_roles(connection)
    if existing:  # concurrent grants fail: both update the same catalog rows
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('esper roles'))")
    for role in existing:
        names = {"schema": sql.Identifier(schema), "group": sql.Identifier(role.group)}
        privileges = sql.SQL(", ").join(sql.SQL(privilege) for privilege in PRIVILEGES[role])
        connection.execute(sql.SQL("GRANT USAGE ON SCHEMA {schema} TO {group}").format(**names))
        tables = sql.SQL("GRANT {privileges} ON ALL TABLES IN SCHEMA {schema} TO {group}")
        connection.execute(tables.format(privileges=privileges, **names))
    if DatabaseRole.WRITER in existing:
        _transfer_partitions(connection, schema)


def make_user(postgres: PostgresSettings, user: str, role: DatabaseRole, password: SecretStr | None) -> bool:
    """Create a user in a group role, or add an existing user to it and set the password.

    Args:
        password: None keeps the current one (the server may authenticate users by other means).

    Returns:
        Whether the user was created.

    Raises:
        ConfigError: the group role does not exist.
        NotAllowedError, UnavailableError: as ``apply_roles``.
    """
    with _connected(postgres) as connection:
        if role not in _existing_roles(connection):
            raise ConfigError(f"role {role.group} does not exist: run `esper roles apply`")
        names = {"user": sql.Identifier(user), "group": sql.Identifier(role.group)}
        found = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (user,)).fetchone()
        if found is None:
            connection.execute(sql.SQL("CREATE ROLE {user} LOGIN").format(**names))
        connection.execute(sql.SQL("GRANT {group} TO {user}").format(**names))
        if password is not None:
            # hashed by libpq: the server, its log and its statistics see only the SCRAM verifier
            hashed = connection.pgconn.encrypt_password(password.get_secret_value().encode(), user.encode(), None)
            altered = sql.SQL("ALTER ROLE {user} PASSWORD {hashed}")
            connection.execute(altered.format(hashed=sql.Literal(hashed.decode()), **names))
        if role is DatabaseRole.WRITER:
            database = sql.Identifier(connection.info.dbname)
            set_role = sql.SQL("ALTER ROLE {user} IN DATABASE {database} SET role = {group}")
            connection.execute(set_role.format(database=database, **names))
    return found is None


def members(postgres: PostgresSettings) -> list[Member]:
    """The users in the group roles, sorted by group and user."""
    with _connected(postgres) as connection:
        rows = connection.execute(
            "SELECT g.rolname, u.rolname, u.rolcanlogin FROM pg_auth_members AS m "
            "JOIN pg_roles AS g ON g.oid = m.roleid JOIN pg_roles AS u ON u.oid = m.member "
            "WHERE g.rolname = ANY(%s) ORDER BY 1, 2",
            ([role.group for role in DatabaseRole],),
        ).fetchall()
    roles = {role.group: role for role in DatabaseRole}
    return sorted({Member(roles[group], user, can_login) for group, user, can_login in rows}, key=str)


def _existing_roles(connection: psycopg.Connection[Any]) -> list[DatabaseRole]:
    rows = connection.execute(
        "SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", ([role.group for role in DatabaseRole],)
    ).fetchall()
    return [role for role in DatabaseRole if (role.group,) in rows]


def _transfer_partitions(connection: psycopg.Connection[Any], schema: str) -> None:
    """Make the writer group the owner of ``health_windows`` and its partitions, and let it create in the schema."""
    group = sql.Identifier(DatabaseRole.WRITER.group)
    connection.execute(sql.SQL("GRANT CREATE ON SCHEMA {} TO {}").format(sql.Identifier(schema), group))
    # a rebuild also projects, and creates partitions of a table that the group owns
    is_member = connection.execute("SELECT pg_has_role(current_user, %s, 'SET')", (DatabaseRole.WRITER.group,))
    if is_member.fetchone() != (True,):
        connection.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(group))
    rows = connection.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(%(schema)s) AND relkind IN ('r', 'p') "
        "AND pg_get_userbyid(relowner) <> %(group)s AND (relname = %(table)s OR oid IN "
        "(SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass(%(schema)s || '.' || %(table)s)))",
        {"schema": quoted(schema), "table": PARTITIONED, "group": DatabaseRole.WRITER.group},
    ).fetchall()
    for (name,) in rows:
        connection.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(schema, name), group))


@contextmanager
def _connected(postgres: PostgresSettings) -> Iterator[psycopg.Connection[Any]]:
    """Open a connection with one transaction, which is committed at the end."""
    try:
        with psycopg.connect(database_address(postgres).dsn, connect_timeout=CONNECT_TIMEOUT_S) as connection:
            yield connection
    except (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege) as error:
        raise postgres_error(error, postgres) from error
