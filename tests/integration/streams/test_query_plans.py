"""Plans of every query of the API and of Urza's work queues, on many rows: no cost grows with the history.

Each query is planned as asyncpg's first calls are (for the values) and as later ones may be (for any value).
"""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support.data.library_rows import FIRST, LATER, LIMIT, OF_A_PAGE, fill

from esper.config import PostgresSettings
from esper.embedded.stack import EmbeddedStack
from esper.streams.database.migrations import migrate
from esper.streams.database.sql_queries import queries

NUM_RUNS = 300
BIG_ROWS = 1000  # a sequential scan of a smaller table is fine
MAX_ROWS_READ = 12 * LIMIT  # per page: its own rows, those that it joins, and those that it sorts
QUERIES = [
    (file, name)
    for file in ("urza", "library")  # queries of the API, and of Urza's polls
    for name in queries(file).available_queries
    if not name.endswith("_cursor") and name != "wanted_kernels"  # compares every blueprint with every width
]
QUERIES += [("causes", "of_seed"), ("causes", "changed_seeds")]


@pytest.fixture(scope="module")
def filled(stack: EmbeddedStack) -> Iterator[psycopg.Connection[Any]]:
    """A database for this module, with the rows of many runs."""
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE plans")
    own = PostgresSettings.model_validate({"dsn": stack.postgres.dsn_of("plans")})
    migrate(own)
    with psycopg.connect(own.dsn.get_secret_value()) as connection:
        connection.prepare_threshold = None
        fill(connection, own.schema_name, NUM_RUNS)
        yield connection


@pytest.mark.parametrize(("file", "name"), QUERIES)
def test_query_uses_indexes_on_big_tables(filled: psycopg.Connection[Any], file: str, name: str) -> None:
    for mode in ("force_custom_plan", "force_generic_plan"):
        for page in (FIRST, LATER):
            nodes = _plan(filled, file, name, mode, {**OF_A_PAGE, **page})
            scanned = [n["Relation Name"] for n in nodes if n["Node Type"] == "Seq Scan"]
            assert [t for t in scanned if _num_rows(filled, t) >= BIG_ROWS] == [], (mode, nodes)
            assert sum(map(_num_rows_read, nodes)) <= MAX_ROWS_READ, (mode, nodes)
            assert not any(n.get("Function Name") == "superseding_incarnations" for n in nodes), "it is inlined"


def _plan(connection: psycopg.Connection[Any], file: str, name: str, mode: str, given: Any) -> list[dict[str, Any]]:
    """The nodes of the executed plan."""
    found = queries(file)
    order = found.driver_adapter.var_sorted[name]
    values = {
        **given,
        "event_ids": [_event(connection, "blueprint_changes")],
        "event_id": _event(connection, "decisions"),
    }
    connection.execute("SELECT set_config('plan_cache_mode', %s, false)", (mode,))
    connection.execute(f"PREPARE planned AS {getattr(found, name).sql.rstrip().rstrip(';')}", prepare=False)
    literals = ", ".join(sql.Literal(values[p]).as_string(connection) for p in order)
    explained = connection.execute(
        f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE planned{f'({literals})' if order else ''}", prepare=False
    ).fetchone()
    connection.execute("DEALLOCATE planned")
    assert explained is not None
    return list(_walk(explained[0][0]["Plan"]))


def _walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {k: v for k, v in node.items() if k != "Plans"}
    for part in node.get("Plans", ()):
        yield from _walk(part)


def _num_rows_read(node: dict[str, Any]) -> float:
    """How many rows of a table a node read."""
    if "Relation Name" not in node:
        return 0
    read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return float(read * node["Actual Loops"])


def _num_rows(connection: psycopg.Connection[Any], table: str) -> int:
    row = connection.execute("SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass", (table,)).fetchone()
    assert row is not None
    return int(row[0])


def _event(connection: psycopg.Connection[Any], table: str) -> Any:
    row = connection.execute(f"SELECT event_id FROM {table} LIMIT 1").fetchone()
    assert row is not None
    return row[0]
