"""Migrations of a database with rows, and the projection of what a migration emptied."""

import asyncio
import uuid
from importlib.resources import as_file, files
from typing import Any

import asyncpg
import psycopg
import pytest
import yoyo
from psycopg import sql
from support.events.event_examples import EXAMPLES, wrap_event
from support.events.generated_logs import GeneratedLog, generate_log

from esper.config import PostgresSettings
from esper.embedded.stack import EmbeddedStack
from esper.schemas.events import TrainerEvent
from esper.schemas.topics import BLUEPRINTS, FIELD_REPORTS, LIFECYCLE, POLICIES, RUNS, TELEMETRY
from esper.streams.database.migrations import migrate
from esper.streams.projectors import PROJECTORS
from esper.streams.worker.batch_projection import Batch, project_batch

LAST_OLD = "0003-breakers"
REPLAYED = {t.name for t in (RUNS, LIFECYCLE, TELEMETRY, BLUEPRINTS, FIELD_REPORTS, POLICIES)}
IN_ARRAYS = {
    "sums": "ARRAY[sum_health_score, sum_activation_mean, sum_activation_std, sum_dead_ratio, sum_gradient_norm]",
    "counts": "ARRAY[count_health_score, count_activation_mean, count_activation_std, count_dead_ratio, "
    "count_gradient_norm]",
}
"""Columns of migration 0003 that were renamed since."""

Rows = dict[str, list[str]]


@pytest.fixture
def old_database(stack: EmbeddedStack) -> PostgresSettings:
    """Empty tables as of migration 0003."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    own = PostgresSettings.model_validate({"dsn": stack.postgres.dsn_of(name)})
    address = own.dsn.get_secret_value()
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(own.schema_name)))
    scheme, rest = address.split("://", 1)
    separator = "&" if "?" in rest else "?"
    backend = yoyo.get_backend(f"{scheme}+psycopg://{rest}{separator}schema={own.schema_name}")
    with backend, as_file(files("esper.streams").joinpath("migrations_sql")) as folder:
        old = [m for m in backend.to_apply(yoyo.read_migrations(str(folder))) if m.id <= LAST_OLD]
        with backend.lock():
            backend.apply_migrations(type(yoyo.read_migrations(str(folder)))(old))
    return own


def whole_log() -> GeneratedLog:
    """Two runs with a resume, redriven dead letters, and one event of every type."""
    scripts = [["train", "epoch", "gap", "save", "train", "resume", "train", "epoch"], ["train", "train"]]
    log, _known = generate_log(7, scripts, share_broken=0.1, share_resent=0.1)
    log.share_broken = 0.0
    for number, event in enumerate(EXAMPLES):
        is_numbered = isinstance(event, TrainerEvent)
        log.add(wrap_event(event.model_copy(update={"sequence": number}) if is_numbered else event))
    return log


def opened(postgres: PostgresSettings) -> psycopg.Connection[Any]:
    return psycopg.connect(postgres.dsn.get_secret_value(), options=f"-csearch_path={postgres.schema_name}")


async def project_log(postgres: PostgresSettings, log: GeneratedLog, topics: set[str]) -> None:
    path = {"search_path": postgres.schema_name}
    connection = await asyncpg.connect(postgres.dsn.get_secret_value(), server_settings=path)
    for tp, records in log.partitions.items():
        if tp[0] in topics:
            await project_batch(connection, Batch(*tp, 0, tuple(records)))
    await connection.close()


def tables(connection: psycopg.Connection[Any]) -> list[str]:
    """The tables, without partitions and those of yoyo."""
    return [
        name
        for (name,) in connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p') "
            "AND NOT relispartition AND relname NOT LIKE '%yoyo%' ORDER BY relname"
        )
    ]


def rows(connection: psycopg.Connection[Any]) -> Rows:
    """Every row of every table, as text."""
    return {
        name: [
            text
            for (text,) in connection.execute(
                sql.SQL("SELECT t::text FROM {} AS t ORDER BY 1").format(sql.Identifier(name))
            )
        ]
        for name in tables(connection)
    }


def copy_into_old(new: psycopg.Connection[Any], old: psycopg.Connection[Any]) -> None:
    """Copy every row that the old tables can hold."""
    for name in tables(old):
        columns = [
            c.name
            for c in old.execute(sql.SQL("SELECT * FROM {} LIMIT 0").format(sql.Identifier(name))).description or ()
        ]
        key = [
            column
            for (column,) in old.execute(
                "SELECT a.attname FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid "
                "AND a.attnum = ANY(i.indkey) WHERE i.indrelid = %s::regclass AND i.indisprimary",
                (name,),
            )
        ]
        query = sql.SQL("COPY (SELECT DISTINCT ON ({}) {} FROM {}) TO STDOUT").format(
            sql.SQL(", ").join(map(sql.Identifier, key)),
            sql.SQL(", ").join(sql.SQL(IN_ARRAYS[c]) if c in IN_ARRAYS else sql.Identifier(c) for c in columns),
            sql.Identifier(name),
        )
        with (
            new.cursor().copy(query) as source,
            old.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(sql.Identifier(name))) as target,
        ):
            for data in source:
                target.write(data)
    old.commit()


def topics_with_positions(connection: psycopg.Connection[Any]) -> set[str]:
    return {topic for (topic,) in connection.execute("SELECT DISTINCT topic FROM positions")}


def test_migrated_rows_and_log_equal_a_fresh_projection(
    own_database: PostgresSettings, old_database: PostgresSettings
) -> None:
    log = whole_log()
    asyncio.run(project_log(own_database, log, set(PROJECTORS)))
    with opened(own_database) as new, opened(old_database) as old:
        new.execute("INSERT INTO cluster VALUES (true, 'the-cluster')")
        fresh = rows(new)
        copy_into_old(new, old)
        assert not {name for name, found in rows(old).items() if not found}, "every table has rows"

    applied = migrate(old_database)
    assert applied
    assert applied[0] > LAST_OLD
    with opened(old_database) as old:
        emptied = rows(old)
        assert topics_with_positions(old) == set(PROJECTORS) - REPLAYED
        for name in ("progress", "redriven"):
            assert not any(topic in line for line in emptied[name] for topic in REPLAYED)
        for name, found in emptied.items():
            assert set(found) <= set(fresh[name]), f"{name}: no row is left that the log does not give"
    assert migrate(old_database) == []
    with opened(old_database) as old:
        assert rows(old) == emptied

    asyncio.run(project_log(old_database, log, REPLAYED))
    with opened(old_database) as old:
        assert rows(old) == fresh
