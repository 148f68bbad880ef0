"""Stacks and databases of a test's own, with topics and tables in place."""

import asyncio
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

from esper.config import PostgresSettings
from esper.embedded.stack import EmbeddedStack
from esper.oona.admin.topics import apply_topics
from esper.streams.database.migrations import migrate

LONG_FAULT_ROUNDS = 8
"""Rounds of faults from which on the slow fault suites run too."""


def new_database(stack: EmbeddedStack) -> PostgresSettings:
    """One more database, migrated, in a stack's Postgres."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    own = PostgresSettings.model_validate({"dsn": stack.postgres.dsn_of(name)})
    migrate(own)
    return own


@contextmanager
def running_stack() -> Iterator[EmbeddedStack]:
    """A stack with topics and tables in place."""
    with tempfile.TemporaryDirectory(prefix="esper-test-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o711)
        with EmbeddedStack(Path(folder)) as running:
            settings = running.settings()
            with ThreadPoolExecutor(1) as pool:  # a loop may run in this thread already
                pool.submit(asyncio.run, apply_topics(settings.need_kafka())).result()
            migrate(settings.need_postgres())
            yield running
