"""What the API asks of Postgres stays cheap however long the history grows: plans of every statement, on many rows.

Each is planned as asyncpg's first calls are (for the values) and as its later ones may be (for any value).
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from library_rows import fill
from psycopg import sql

from esper.config import PostgresSettings
from esper.embedded.stack import EmbeddedStack
from esper.streams.migrations import migrate
from esper.streams.queries import queries

NUM_RUNS = 300
BIG_ROWS = 1000  # a table with fewer may be read whole
NOT_OF_A_REQUEST = {"wanted_kernels"}  # the certifier's
LIMIT = 101
MOST_ROWS = 12 * LIMIT  # that a page may touch: itself, what it joins, and what it sorts
OF_A_PAGE = {
    "run_id": "run-000150", "layer_id": "block3.conv", "seed_id": 1, "blueprint_id": "bp-0100", "limit": LIMIT,
    "kernel_sha256": "ab" * 32, "module": None, "target": None, "num_features": None, "stage": None, "action": None,
    "topic": None, "statuses": ["certified", "proposed", "retired", "running", "completed"],
}  # fmt: skip
FIRST = {
    "after_id": "", "after_run": "", "after_layer": "", "after_target": "", "after_blueprint": "", "after_sha256": "",
    "after_source": "", "after_topic": "", "after_offset": -1, "after_seed": -1, "after_incarnation": -1,
    "after_sequence": -1, "after_boundary": -1, "after_features": -1, "after_ordinal": -1, "after_partition": -1,
    "after_at": datetime(9999, 1, 1, tzinfo=UTC),
}  # fmt: skip
LATER = {
    "after_id": "bp-0100", "after_run": "run-000150", "after_layer": "block3.conv", "after_target": "conv2d",
    "after_blueprint": "bp-0100", "after_sha256": "ab" * 32, "after_source": "block3.conv",
    "after_topic": "system.topic-2", "after_offset": 10, "after_seed": 0, "after_incarnation": 1, "after_sequence": 3,
    "after_boundary": 20, "after_features": 64, "after_ordinal": 3, "after_partition": 2,
    "after_at": datetime(2026, 1, 6, tzinfo=UTC),
}  # fmt: skip
STATEMENTS = [("urza", name) for name in queries("urza").available_queries if not name.endswith("_cursor")]
STATEMENTS += [("causes", "of_seed"), ("causes", "seeds_with_a_story")]


@pytest.fixture(scope="module")
def filled(stack: EmbeddedStack) -> Iterator[psycopg.Connection[Any]]:
    """A database of this module's own, with the rows of many runs."""
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE plans")
    own = PostgresSettings.model_validate({"dsn": stack.postgres.dsn_of("plans")})
    migrate(own)
    with psycopg.connect(own.dsn.get_secret_value()) as connection:
        connection.prepare_threshold = None
        fill(connection, own.schema_name, NUM_RUNS)
        yield connection


@pytest.mark.parametrize(("room", "name"), STATEMENTS)
def test_no_statement_of_a_request_reads_a_big_table_whole(
    filled: psycopg.Connection[Any], room: str, name: str
) -> None:
    if name in NOT_OF_A_REQUEST:
        pytest.skip("no request waits for it")
    for mode in ("force_custom_plan", "force_generic_plan"):
        for page in (FIRST, LATER):
            nodes = _plan(filled, room, name, mode, {**OF_A_PAGE, **page})
            whole = [n["Relation Name"] for n in nodes if n["Node Type"] == "Seq Scan"]
            assert [t for t in whole if _num_rows(filled, t) >= BIG_ROWS] == [], (mode, nodes)
            assert sum(map(_touched, nodes)) <= MOST_ROWS, (mode, nodes)


def _plan(connection: psycopg.Connection[Any], room: str, name: str, mode: str, given: Any) -> list[dict[str, Any]]:
    """The nodes of the plan that ran."""
    found = queries(room)
    order = found.driver_adapter.var_sorted[name]
    values = {
        **given,
        "event_ids": [_event(connection, "blueprint_changes")],
        "event_id": _event(connection, "decisions"),
    }
    connection.execute("SELECT set_config('plan_cache_mode', %s, false)", (mode,))
    connection.execute(f"PREPARE asked AS {getattr(found, name).sql.rstrip().rstrip(';')}", prepare=False)
    literals = ", ".join(sql.Literal(values[p]).as_string(connection) for p in order)
    explained = connection.execute(
        f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE asked{f'({literals})' if order else ''}", prepare=False
    ).fetchone()
    connection.execute("DEALLOCATE asked")
    assert explained is not None
    return list(_walk(explained[0][0]["Plan"]))


def _walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {k: v for k, v in node.items() if k != "Plans"}
    for part in node.get("Plans", ()):
        yield from _walk(part)


def _touched(node: dict[str, Any]) -> float:
    """Rows of a table that a node looked at; those of other nodes came from here."""
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
