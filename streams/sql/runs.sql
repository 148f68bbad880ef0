-- system.runs: the course of runs. A run's row follows its newest incarnation.

-- name: runs_of
SELECT
    run_id, model, status, incarnation, step, epoch, hyperparameters, results, detail, started_at, ended_at, told_at
FROM runs WHERE run_id = ANY(:run_ids);

-- name: write_runs!
INSERT INTO runs (
    run_id, model, status, incarnation, step, epoch, hyperparameters, results, detail, started_at, ended_at,
    told_at
) SELECT * FROM unnest(
    :run_id::text[], :model::text[], :status::text[], :incarnation::integer[], :step::bigint[], :epoch::integer[],
    :hyperparameters::jsonb[], :results::jsonb[], :detail::text[], :started_at::timestamptz[],
    :ended_at::timestamptz[], :told_at::timestamptz[]
)
ON CONFLICT (run_id) DO UPDATE SET
    status = EXCLUDED.status, incarnation = EXCLUDED.incarnation, step = EXCLUDED.step, epoch = EXCLUDED.epoch,
    results = EXCLUDED.results, detail = EXCLUDED.detail, ended_at = EXCLUDED.ended_at,
    told_at = EXCLUDED.told_at;

-- name: insert_layers!
INSERT INTO layers (
    run_id, layer_id, ordinal, kind, num_features, num_parameters, num_seeds
) SELECT * FROM unnest(
    :run_id::text[], :layer_id::text[], :ordinal::integer[], :kind::text[], :num_features::integer[],
    :num_parameters::bigint[], :num_seeds::integer[]
)
ON CONFLICT DO NOTHING;

-- name: insert_edges!
INSERT INTO edges (
    run_id, source, target
) SELECT * FROM unnest(
    :run_id::text[], :source::text[], :target::text[]
)
ON CONFLICT DO NOTHING;

-- name: insert_incarnations!
INSERT INTO incarnations (
    run_id, incarnation, from_incarnation, from_step, seeds, command_offset, event_id, causation_id, at,
    log_offset, from_epoch
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :from_incarnation::integer[], :from_step::bigint[], :seeds::jsonb[],
    :command_offset::bigint[], :event_id::uuid[], :causation_id::uuid[], :at::timestamptz[],
    :log_offset::bigint[], :from_epoch::integer[]
)
ON CONFLICT DO NOTHING;

-- name: insert_boundaries!
INSERT INTO boundaries (
    run_id, incarnation, boundary, sequence, step, epoch, last_sequences, event_id, traceparent, at, log_offset
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :boundary::integer[], :sequence::bigint[], :step::bigint[],
    :epoch::integer[], :last_sequences::jsonb[], :event_id::uuid[], :traceparent::text[], :at::timestamptz[],
    :log_offset::bigint[]
)
ON CONFLICT DO NOTHING;

-- name: insert_epochs!
INSERT INTO epochs (
    run_id, incarnation, sequence, epoch, step, metrics, event_id, at, log_offset
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :sequence::bigint[], :epoch::integer[], :step::bigint[],
    :metrics::jsonb[], :event_id::uuid[], :at::timestamptz[], :log_offset::bigint[]
)
ON CONFLICT DO NOTHING;

-- name: insert_checkpoints!
INSERT INTO checkpoints (
    run_id, incarnation, sequence, step, epoch, sha256, size_bytes, event_id, at
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :sequence::bigint[], :step::bigint[], :epoch::integer[],
    :sha256::text[], :size_bytes::bigint[], :event_id::uuid[], :at::timestamptz[]
)
ON CONFLICT DO NOTHING;

-- name: insert_gaps!
INSERT INTO telemetry_gaps (
    run_id, incarnation, sequence, from_step, to_step, num_lost, event_id, at, log_offset
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :sequence::bigint[], :from_step::bigint[], :step::bigint[],
    :num_lost::bigint[], :event_id::uuid[], :at::timestamptz[], :log_offset::bigint[]
)
ON CONFLICT DO NOTHING;
