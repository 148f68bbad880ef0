"""Stacks and databases that no other test uses, with topics and tables created."""

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
"""Minimum of --fault-rounds with which the slow fault tests run too."""


def new_database(stack: EmbeddedStack) -> PostgresSettings:
    """Create a database in a stack's Postgres and migrate it."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    own = PostgresSettings.model_validate({"dsn": stack.postgres.dsn_of(name)})
    migrate(own)
    return own


@contextmanager
def running_stack() -> Iterator[EmbeddedStack]:
    """Run a stack with topics and tables created."""
    with tempfile.TemporaryDirectory(prefix="esper-test-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o711)
        with EmbeddedStack(Path(folder)) as running:
            settings = running.settings()
            with ThreadPoolExecutor(1) as pool:  # this thread may have a running event loop
                pool.submit(asyncio.run, apply_topics(settings.need_kafka())).result()
            migrate(settings.need_postgres())
            yield running
