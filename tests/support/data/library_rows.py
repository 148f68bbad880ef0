"""Rows of a library with a long history, by SQL alone: for plans and benchmarks of queries.

The rows refer to each other as projected ones do (runs, seeds, decisions, causes), but no log has them. A column that
is not named here and must not be null gets a value by its type.
"""

from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql

NUM_BLUEPRINTS = 200
WIDTHS = 10
LAYERS, SEEDS, EPOCHS, BOUNDARIES, MOVES, REPORTS = 10, 20, 30, 50, 60, 6  # of a run
GROWN = "jsonb_build_array(jsonb_build_object('layer_id', 'block9.conv', 'seed_id', 7, 'stage', 'fossilized', \
'stage_since_step', 3, 'blueprint_id', 'bp-' || lpad((r % 200)::text, 4, '0'), 'kernel_sha256', repeat('ab', 32)))"
RUN = {"run_id": "'run-' || lpad(r::text, 6, '0')", "incarnation": "1"}
START = "timestamptz '2026-01-01' + r * interval '1 hour'"
SEED = {"layer_id": "'block' || n % 10 || '.conv'", "seed_id": "n / 10 % 2"}
BLUEPRINT = {"blueprint_id": "'bp-' || lpad(((r + n) % 200)::text, 4, '0')"}
SHA256 = {"kernel_sha256": "encode(sha256(((r + n) % 4000)::text::bytea), 'hex')"}
BY_TYPE = {
    "bigint": "n", "integer": "0", "text": "''", "boolean": "false", "uuid": "md5(r || '.' || n)::uuid",
    "jsonb": "'{}'", "timestamp with time zone": START, "double precision": "0.5",
}  # fmt: skip
LIMIT = 101  # rows that a page of 100 reads
# Parameters of the statements in urza.sql: for the first page, and for one in the middle of the list.
OF_A_PAGE = {
    "run_id": "run-000150", "layer_id": "block3.conv", "seed_id": 1, "blueprint_id": "bp-0100", "limit": LIMIT,
    "kernel_sha256": "ab" * 32, "module": None, "target": None, "num_features": None, "stage": None, "action": None,
    "topic": None, "status": None, "offset": 0, "blueprint_ids": ["bp-0100", "bp-0101"], "answered_ids": ["bp-0100"],
    "answered_versions": [3], "statuses": ["certified", "proposed", "retired", "running", "completed"],
}  # fmt: skip
FIRST = {
    "after_id": "", "after_run": "", "after_layer": "", "after_target": "", "after_blueprint": "", "after_sha256": "",
    "after_source": "", "after_topic": "", "after_offset": -1, "after_seed": -1, "after_incarnation": -1,
    "after_sequence": -1, "after_boundary": -1, "after_features": -1, "after_ordinal": -1, "after_partition": -1,
    "after_version": -1, "after_at": datetime(9999, 1, 1, tzinfo=UTC),
}  # fmt: skip
LATER = {
    "after_id": "bp-0100", "after_run": "run-000150", "after_layer": "block3.conv", "after_target": "conv2d",
    "after_blueprint": "bp-0100", "after_sha256": "ab" * 32, "after_source": "block3.conv",
    "after_topic": "system.topic-2", "after_offset": 10, "after_seed": 0, "after_incarnation": 1, "after_sequence": 3,
    "after_boundary": 20, "after_features": 64, "after_ordinal": 3, "after_partition": 2,
    "after_version": 1, "after_at": datetime(2026, 1, 6, tzinfo=UTC),
}  # fmt: skip


def _id(kind: str, n: str = "n") -> str:
    return f"md5('{kind}' || r || '/' || {n})::uuid"


def _tables(num_runs: int) -> list[tuple[str, int, int, dict[str, str]]]:
    """Table, groups (``r``), rows of each (``n``), and columns by what they hold."""
    spec = "jsonb_build_object('module', 'module_' || r % 20, 'targets', jsonb_build_array('linear', 'conv2d'))"
    own = {"blueprint_id": "'bp-' || lpad(r::text, 4, '0')"}
    stages = "(ARRAY['dormant','germinated','training','grafting','stabilizing','evaluating','fossilized'])"
    num_all = 10 * num_runs
    reached = f"{stages}[{{}} % 6 + 1]"
    decided = {**RUN, "boundary": "n", "step": "n * 10"}
    return [
        ("runs", num_all, 1, {**RUN, "model": "'ResNet'", "started_at": START, "step": "500", "status": (
            "(ARRAY['completed','running','completed','failed'])[r % 4 + 1]"), "hyperparameters": "'{\"lr\": 0.1}'"}),
        ("incarnations", num_all, 1, {**RUN, "from_step": "0", "seeds": "'[]'"}),
        ("incarnations", num_all, 1, {**RUN, "incarnation": "2", "from_incarnation": "1", "from_step": "400",
            "seeds": GROWN}),
        ("layers", num_runs, LAYERS, {**RUN, "layer_id": "'block' || n || '.conv'", "ordinal": "n",
            "kind": "'conv2d'", "num_features": "16 * (n + 1)", "num_seeds": "2"}),
        ("edges", num_runs, LAYERS - 1, {**RUN, "source": "'block' || n || '.conv'",
            "target": "'block' || n + 1 || '.conv'"}),
        ("epochs", num_runs, EPOCHS, {**RUN, "sequence": "n", "epoch": "n",
            "metrics": "jsonb_build_object('val_accuracy', 0.5)"}),
        ("boundaries", num_runs, BOUNDARIES, decided),
        ("decisions", num_runs, BOUNDARIES, {**decided, **BLUEPRINT, **SEED, "policy_id": "'schedule'",
            "action": "(ARRAY['wait','germinate','wait','fossilize','wait'])[n % 5 + 1]", "event_id": _id("decision")}),
        ("views", num_runs, BOUNDARIES, {**decided, "digest": "repeat('ab', 32)"}),
        ("commands", num_runs, SEEDS, {**RUN, **SEED, **BLUEPRINT, "boundary": "n", "type": "'esper.seed.germinate'",
            "command_id": _id("command"), "decision_id": _id("decision"), "causation_id": _id("decision")}),
        ("lifecycle", num_runs, MOVES, {**RUN, **SEED, **BLUEPRINT, **SHA256, "sequence": "n", "step": "n * 8",
            "from_stage": reached.format("(n / 20)"), "to_stage": f"{stages}[n / 20 + 2]", "event_id": _id("move"),
            "causation_id": _id("command", "n % 20")}),
        ("seeds", num_runs, SEEDS, {**RUN, **SEED, **BLUEPRINT, **SHA256, "stage": "'grafting'"}),
        ("rejections", num_runs, 2, {**RUN, **SEED, "sequence": "n"}),
        ("breaker_changes", num_runs, 2, {**RUN, **SEED, "sequence": "n"}),
        ("field_reports", num_runs, REPORTS, {**RUN, **SEED, **BLUEPRINT, "sequence": "n", "method": "'before_after'",
            "outcome": "(ARRAY['fossilized','culled','rolled_back'])[n % 3 + 1]", "metric": "'val_accuracy'",
            "step": "n * 90", "before": "0.5", "after": "0.5 + random() / 10", "event_id": _id("report"),
            "decision_id": _id("decision"), "command_id": _id("command"), "causation_id": _id("move")}),
        ("blueprints", NUM_BLUEPRINTS, 1, {**own, "version": "3", "spec": spec,
            "status": "(ARRAY['certified','certified','proposed','retired'])[r % 4 + 1]"}),
        ("blueprint_changes", NUM_BLUEPRINTS, 100, {**own, "event_id": _id("change"), "log_offset": "n",
            "change": "'retire'", "verdict": "CASE n WHEN 50 THEN 'accepted' ELSE 'wrong_version' END",
            "version_after": "CASE n WHEN 50 THEN 3 END"}),
        ("kernels", NUM_BLUEPRINTS, 2 * WIDTHS, {**own, "num_features": "16 * (n % 10 + 1)", "size_bytes": "500",
            "kernel_sha256": "encode(sha256((r * 20 + n)::text::bytea), 'hex')",
            "target": "(ARRAY['linear','conv2d'])[n / 10 + 1]"}),
        ("certificates", NUM_BLUEPRINTS, 10, {**own, "blueprint_version": "n", "checks": "'[\"shapes\"]'",
            "measurements": "'[]'"}),
        ("kernel_refusals", NUM_BLUEPRINTS, WIDTHS, {**own, "num_features": "2000000 + n", "target": "'linear'",
            "blueprint_version": "3"}),
        ("dead_letters", 10, num_runs, {"topic": "'system.topic-' || r % 5", "log_partition": "r",
            "log_offset": "n", "reason": "'undecodable'"}),
        ("redriven", 10, num_runs // 10, {"topic": "'system.topic-' || r % 5", "log_partition": "r", "log_offset": "n"}),
    ]  # fmt: skip


def fill(connection: psycopg.Connection[Any], schema: str, num_runs: int) -> None:
    """Add ``num_runs`` runs with all their rows, ten times as many without, and have Postgres count them."""
    connection.execute(sql.SQL("SET search_path TO {}").format(sql.Identifier(schema)))
    for table, groups, rows, named in _tables(num_runs):
        columns = {**_needed(connection, table), **named}
        columns = {name: value for name, value in columns.items() if name in _all(connection, table)}
        connection.execute(
            sql.SQL(
                "INSERT INTO {} ({}) SELECT {} FROM generate_series(0, {}) AS r, generate_series(0, {}) AS n"
            ).format(
                sql.Identifier(table),
                sql.SQL(", ").join(map(sql.Identifier, columns)),
                sql.SQL(", ").join(map(sql.SQL, columns.values())),
                sql.Literal(groups - 1),
                sql.Literal(rows - 1),
            )
        )
    connection.commit()
    connection.autocommit = True
    connection.execute("VACUUM ANALYZE")


def _needed(connection: psycopg.Connection[Any], table: str) -> dict[str, str]:
    found = _all(connection, table)
    return {name: BY_TYPE[kind] for name, (kind, is_nullable) in found.items() if not is_nullable and kind in BY_TYPE}


def _all(connection: psycopg.Connection[Any], table: str) -> dict[str, tuple[str, bool]]:
    rows = connection.execute(
        "SELECT column_name, data_type, is_nullable = 'YES' OR column_default IS NOT NULL "
        "FROM information_schema.columns WHERE table_schema = current_schema() AND table_name = %s",
        (table,),
    ).fetchall()
    return {name: (kind, is_nullable) for name, kind, is_nullable in rows}
