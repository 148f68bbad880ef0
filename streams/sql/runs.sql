-- system.runs: runs and their incarnations. The row of a run follows its newest incarnation.

-- name: runs_of
SELECT
    run_id, model, status, incarnation, step, epoch, hyperparameters, results, detail, started_at, ended_at, told_at
FROM runs WHERE run_id = ANY(:run_ids);

-- name: upsert_runs!
INSERT INTO runs {rows:
    run_id text, model text, status text, incarnation integer, step bigint, epoch integer, hyperparameters jsonb,
    results jsonb, detail text, started_at timestamptz, ended_at timestamptz, told_at timestamptz
}
ON CONFLICT (run_id) DO UPDATE SET
    status = EXCLUDED.status, incarnation = EXCLUDED.incarnation, step = EXCLUDED.step, epoch = EXCLUDED.epoch,
    results = EXCLUDED.results, detail = EXCLUDED.detail, ended_at = EXCLUDED.ended_at,
    told_at = EXCLUDED.told_at;

-- name: insert_layers!
INSERT INTO layers {rows:
    run_id text, layer_id text, ordinal integer, kind text, num_features integer, num_parameters bigint,
    num_seeds integer
} ON CONFLICT DO NOTHING;

-- name: insert_edges!
INSERT INTO edges {rows: run_id text, source text, target text} ON CONFLICT DO NOTHING;

-- name: insert_incarnations!
INSERT INTO incarnations {rows:
    run_id text, incarnation integer, from_incarnation integer, from_step bigint, seeds jsonb,
    command_offset bigint, event_id uuid, causation_id uuid, at timestamptz, log_offset bigint, from_epoch integer
} ON CONFLICT DO NOTHING;

-- name: insert_boundaries!
INSERT INTO boundaries {rows:
    run_id text, incarnation integer, boundary integer, sequence bigint, step bigint, epoch integer,
    last_sequences jsonb, event_id uuid, traceparent text, at timestamptz, log_offset bigint
} ON CONFLICT DO NOTHING;

-- name: insert_epochs!
INSERT INTO epochs {rows:
    run_id text, incarnation integer, sequence bigint, epoch integer, step bigint, metrics jsonb, event_id uuid,
    at timestamptz, log_offset bigint
} ON CONFLICT DO NOTHING;

-- name: insert_checkpoints!
INSERT INTO checkpoints {rows:
    run_id text, incarnation integer, sequence bigint, step bigint, epoch integer, sha256 text, size_bytes bigint,
    event_id uuid, at timestamptz
} ON CONFLICT DO NOTHING;

-- name: insert_gaps!
INSERT INTO telemetry_gaps {rows:
    run_id text, incarnation integer, sequence bigint, from_step bigint, to_step bigint = :step, num_lost bigint,
    event_id uuid, at timestamptz, log_offset bigint
} ON CONFLICT DO NOTHING;
