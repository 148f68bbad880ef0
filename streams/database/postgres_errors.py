"""Translates the errors of asyncpg and psycopg, and validates the DSN.

Owns the lists of errors by what a caller can do about them. The DSN is validated before a driver sees it: drivers
repeat a DSN that they cannot parse, with its password.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import asyncpg
import psycopg

from esper.config import PostgresSettings
from esper.errors import ConfigError, EsperError, NotAllowedError, UnavailableError

SCHEMES = ("postgresql", "postgres")
DSN = "ESPER_POSTGRES__DSN"
HOST = re.compile(r"^([^:\[\]]*|\[[0-9a-fA-F:.]+\])(:[0-9]+)?$")
NO_SUCH_USER, NO_RIGHT, NO_SUCH_DATABASE = ("28000", "28P01"), "42501", "3D000"  # SQLSTATE
# libpq gives no SQLSTATE for a connection that failed
REFUSED_TEXT = re.compile(r"authentication failed|no password supplied|pg_hba\.conf|role .* does not exist", re.I)
NO_DATABASE_TEXT = re.compile(r"FATAL: +database .* does not exist", re.I)


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """A validated DSN. Only ``location`` (host, port and database) may be shown."""

    dsn: str = field(repr=False)
    location: str
    user: str


def database_address(postgres: PostgresSettings) -> DatabaseAddress:
    """The validated address in the settings.

    Raises:
        ConfigError: it is not postgresql://USER:PASSWORD@HOST:PORT/DATABASE; the message does not repeat it.
    """
    dsn = postgres.dsn.get_secret_value()
    try:
        parts = urlsplit(dsn)
    except ValueError:
        raise _malformed() from None
    user, _, hosts = parts.netloc.rpartition("@")
    is_clear = "@" not in user + parts.path and not parts.fragment
    if parts.scheme not in SCHEMES or not is_clear or not all(HOST.match(h) for h in hosts.split(",")):
        raise _malformed()
    return DatabaseAddress(dsn, f"{hosts}{parts.path}", unquote(user.partition(":")[0]))


def postgres_error(error: BaseException, postgres: PostgresSettings) -> EsperError:
    """Translate an error of asyncpg or psycopg; raise the result ``from`` it."""
    address = database_address(postgres)
    state, text = getattr(error, "sqlstate", None), " ".join(str(error).split())
    if state in NO_SUCH_USER or REFUSED_TEXT.search(text):
        return NotAllowedError(
            f"Postgres at {address.location} refuses user {address.user!r}: the user is unknown, the password is wrong "
            f"or pg_hba.conf does not admit this host; check {DSN}"
        )
    if state == NO_RIGHT:
        return NotAllowedError(
            f"user {address.user!r} lacks a right at Postgres {address.location}: {text}; grant it, or run "
            "`esper roles apply`"
        )
    if state == NO_SUCH_DATABASE or NO_DATABASE_TEXT.search(text):
        return ConfigError(f"Postgres has no database {address.location}: create it, or check {DSN}")
    return UnavailableError(
        f"no Postgres answers at {address.location}: {text or type(error).__name__}; "
        f"is it running (`esper status`), and is {DSN} right?"
    )


DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""The base classes of asyncpg's errors. InternalClientError: Postgres closed the connection during a query."""

CONNECT_ERRORS = (OSError, *DRIVER_ERRORS, psycopg.Error)
"""Errors of a driver that cannot connect. TimeoutError is a subclass of OSError."""

CONNECTION_LOST_ERRORS = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
)
"""Errors of asyncpg when the connection is lost, independent of the statement."""

UNAVAILABLE_ERRORS = (
    *CONNECTION_LOST_ERRORS,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InsufficientPrivilegeError,
)
"""Errors of asyncpg when the server is unavailable, out of resources or refuses; the statement is not the cause."""

TRANSIENT_ERRORS = (
    *CONNECTION_LOST_ERRORS,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby, until it is promoted
    asyncpg.IdleInTransactionSessionTimeoutError,  # this process was suspended
    asyncpg.TransactionTimeoutError,
    asyncpg.TransactionRollbackError,
    asyncpg.InvalidCachedStatementError,  # a rebuild was swapped in
    asyncpg.UndefinedTableError,  # a rebuild was swapped in
    asyncpg.InternalServerError,  # a rebuild was swapped in: "could not open relation with OID"
)
"""Errors after which a retry of the whole transaction can succeed."""

LOCK_ERRORS = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
"""Errors of a statement with a lock timeout when another transaction holds the lock."""


def _malformed() -> ConfigError:
    return ConfigError(
        f"{DSN} cannot be read: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with %40, %2F, %3A, %3F and %23 "
        "for @, /, :, ? and # in the password"
    )
