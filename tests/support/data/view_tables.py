"""Rows of long use without a log, by generate_series: for plans and timings of Tamiyo's queries."""

from dataclasses import astuple, dataclass
from typing import Any

HISTORY = """
INSERT INTO runs SELECT format('%s-%s', f.prefix, n), 'Net', f.status, 1, 700, 9, '{"epochs": 10}', NULL, '',
    timestamptz '2026-01-01Z', NULL, timestamptz '2026-01-01Z' + n * interval '1 s' + f.last_event_days * interval '1 day'
FROM filling AS f, generate_series(1, f.count) AS n;

INSERT INTO incarnations SELECT format('%s-%s', f.prefix, n), i, NULLIF(i - 1, 0), 0, '[]', 0, gen_random_uuid(), NULL,
    timestamptz '2026-01-01Z', i, 0
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, 2) AS i;

INSERT INTO layers SELECT format('%s-%s', f.prefix, n), format('layer%s', l), l, 'linear', 64, 4160, f.num_seeds
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_layers) AS l;

INSERT INTO edges SELECT format('%s-%s', f.prefix, n), format('layer%s', l), format('layer%s', l + 1)
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_layers - 1) AS l;

INSERT INTO boundaries SELECT format('%s-%s', f.prefix, n), 1, b, 40 * b, 16 * b, b / 5, jsonb_build_object(
    'control.kasmina.lifecycle', 40 * b - 1, 'telemetry.seed.health', 40 * b - 2, 'system.runs', 40 * b - 3),
    gen_random_uuid(), NULL, timestamptz '2026-01-01Z', 100 * b
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_boundaries) AS b;

INSERT INTO epochs SELECT format('%s-%s', f.prefix, n), 1, 40 * b - 3, b, 16 * b, '{"val_accuracy": 0.5, "loss": 1.25}',
    gen_random_uuid(), timestamptz '2026-01-01Z', 100 * b - 5
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_boundaries) AS b;

INSERT INTO lifecycle SELECT format('%s-%s', f.prefix, n), 1, 40 * b - 20 + s, 16 * b, format('layer%s', 1 + b % f.num_layers), s,
    'dormant', 'germinated', 'command', 'b7', NULL, NULL, 8, '', false, gen_random_uuid(), NULL,
    timestamptz '2026-01-01Z', 40 * b - 20 + s
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_boundaries) AS b, generate_series(0, 1) AS s;

INSERT INTO rejections SELECT format('%s-%s', f.prefix, n), 1, 40 * b - 10, 16 * b, 'layer1', 0, gen_random_uuid(), 'expired', '',
    gen_random_uuid(), NULL, timestamptz '2026-01-01Z', 40 * b - 10
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_boundaries) AS b;

INSERT INTO breaker_changes SELECT format('%s-%s', f.prefix, n), 1, 40 * b - 9, 16 * b, 'layer1', 0, 'closed', 'open', 3, '',
    gen_random_uuid(), NULL, timestamptz '2026-01-01Z', 40 * b - 9
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_boundaries) AS b;

INSERT INTO telemetry_gaps SELECT format('%s-%s', f.prefix, n), 1, 40 * b - 8, 16 * b - 9, 16 * b, 3, gen_random_uuid(),
    timestamptz '2026-01-01Z', 100 * b - 6
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_boundaries) AS b;

INSERT INTO progress SELECT format('%s-%s', f.prefix, n), 1, topic, 40 * f.num_boundaries, 16 * f.num_boundaries
FROM filling AS f, generate_series(1, f.count) AS n,
    unnest(ARRAY['system.runs', 'control.kasmina.lifecycle', 'telemetry.seed.health']) AS topic;

INSERT INTO decisions SELECT format('%s-%s', f.prefix, n), 1, b, 16 * b, CASE b % 3 WHEN 0 THEN 'germinate' ELSE 'wait' END,
    'layer1', 0, 'b7', 0.5, 'heuristic', 1, '', NULL, false,
    md5(format('%s-%s-%s', f.prefix, n, b))::uuid, NULL, NULL, timestamptz '2026-01-01Z'
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_boundaries - 1) AS b;

INSERT INTO views SELECT run_id, incarnation, boundary, 2, '', 900, 0, boundary, event_id, at
FROM filling AS f, decisions WHERE starts_with(run_id, f.prefix || '-');

INSERT INTO commands SELECT gen_random_uuid(), run_id, incarnation, boundary, 'germinate', event_id, 'layer1', 0, 'b7', NULL,
    step + 100, event_id, at
FROM filling AS f, decisions WHERE action <> 'wait' AND starts_with(run_id, f.prefix || '-');

INSERT INTO health_windows SELECT format('%s-%s', f.prefix, n), 1, format('layer%s', l), s, 16 * (b - 1),
    timestamptz '2026-01-01T12:00Z', 0, 0, 4, 0, random(), random() - 0.5, random(), random(), random(), 4, 4, 4, 4, 4
FROM filling AS f, generate_series(1, f.count) AS n, generate_series(1, f.num_layers) AS l,
    generate_series(0, f.num_seeds - 1) AS s,
    generate_series(greatest(1, f.num_boundaries - 3), f.num_boundaries) AS b;
DROP TABLE filling
"""

LIBRARY = """
INSERT INTO blueprint_changes SELECT gen_random_uuid(), format('b%s', n), c, v, 'accepted', v + 1, '', n % 6, 3 * n + v,
    timestamptz '2026-01-01Z'
FROM generate_series(1, $1::integer) AS n,
    unnest(ARRAY['propose', 'compile', 'certify'], ARRAY[0, 1, 2]) AS changes (c, v);

INSERT INTO kernels SELECT encode(sha256(format('%s-%s', n, f)::bytea), 'hex'), format('b%s', n), 2, 'linear', f, 8, 900,
    gen_random_uuid(), timestamptz '2026-01-01Z', n % 6, 3 * n + 1
FROM generate_series(1, $1::integer) AS n, generate_series(8, 128, 8) AS f;

INSERT INTO positions SELECT 'innovation.blueprints', n, 1000000 + $1::integer FROM generate_series(0, 5) AS n
ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Runs:
    """Equal runs named ``<prefix>-1`` and so on; ``last_event_days`` makes their newest event later by so many days."""

    prefix: str
    count: int
    status: str = "completed"
    num_boundaries: int = 60
    num_layers: int = 4
    last_event_days: int = 0
    num_seeds: int = 2


async def fill_runs(connection: Any, runs: Runs) -> None:
    """Insert completely projected runs with decisions up to the boundary before their last."""
    await connection.execute(
        "CREATE TEMPORARY TABLE filling (prefix text, count integer, status text, num_boundaries integer, "
        "num_layers integer, last_event_days integer, num_seeds integer)"
    )
    await connection.execute("INSERT INTO filling VALUES ($1, $2, $3, $4, $5, $6, $7)", *astuple(runs))
    await connection.execute(HISTORY)


async def fill_library(connection: Any, num_blueprints: int) -> None:
    """Insert certified blueprints, each with kernels of 16 widths; ``b7`` is one of them."""
    for statement in LIBRARY.split(";\n"):
        await connection.execute(statement, num_blueprints)


async def analyzed(connection: Any) -> None:
    """Vacuum and analyze, as autovacuum would."""
    await connection.execute("VACUUM ANALYZE")
