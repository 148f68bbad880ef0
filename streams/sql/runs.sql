-- system.runs: the course of runs. A run's row follows its newest incarnation.

-- name: insert_run!
INSERT INTO runs (run_id, model, status, incarnation, step, epoch, hyperparameters, detail, started_at, told_at)
VALUES (:run_id, :model, 'running', 1, 0, 0, :hyperparameters, '', :at, :logged_at)
ON CONFLICT DO NOTHING;

-- name: insert_layer*!
INSERT INTO layers (run_id, layer_id, ordinal, kind, num_features, num_parameters, num_seeds)
VALUES (:run_id, :layer_id, :ordinal, :kind, :num_features, :num_parameters, :num_seeds)
ON CONFLICT DO NOTHING;

-- name: insert_edge*!
INSERT INTO edges (run_id, source, target) VALUES (:run_id, :source, :target)
ON CONFLICT DO NOTHING;

-- name: insert_incarnation!
INSERT INTO incarnations (
    run_id, incarnation, from_incarnation, from_step, seeds, command_offset, event_id, causation_id, at,
    log_offset, from_epoch
) VALUES (
    :run_id, :incarnation, :from_incarnation, :from_step, :seeds, :command_offset,
    :event_id, :causation_id, :at, :log_offset, :from_epoch
)
ON CONFLICT DO NOTHING;

-- name: resume_run!
UPDATE runs SET
    incarnation = :incarnation, step = :step, epoch = :epoch,
    status = 'running', results = NULL, detail = '', ended_at = NULL, told_at = :logged_at
WHERE run_id = :run_id AND incarnation < :incarnation;

-- name: advance_run!
-- Never backwards: a redriven event tells of the past.
UPDATE runs SET step = :step, epoch = :epoch, told_at = greatest(told_at, :logged_at)
WHERE run_id = :run_id AND incarnation = :incarnation AND step <= :step;

-- name: end_run!
UPDATE runs SET status = :status, step = :step, results = :results, detail = :detail, ended_at = :at
WHERE run_id = :run_id AND incarnation = :incarnation;

-- name: insert_boundary!
INSERT INTO boundaries (
    run_id, incarnation, boundary, sequence, step, epoch, last_sequences, event_id, traceparent, at,
    log_offset
) VALUES (
    :run_id, :incarnation, :boundary, :sequence, :step, :epoch, :last_sequences,
    :event_id, :traceparent, :at, :log_offset
)
ON CONFLICT DO NOTHING;

-- name: insert_epoch!
INSERT INTO epochs (run_id, incarnation, sequence, epoch, step, metrics, event_id, at, log_offset)
VALUES (:run_id, :incarnation, :sequence, :epoch, :step, :metrics, :event_id, :at, :log_offset)
ON CONFLICT DO NOTHING;

-- name: insert_checkpoint!
INSERT INTO checkpoints (run_id, incarnation, sequence, step, epoch, sha256, size_bytes, event_id, at)
VALUES (:run_id, :incarnation, :sequence, :step, :epoch, :sha256, :size_bytes, :event_id, :at)
ON CONFLICT DO NOTHING;

-- name: insert_gap!
INSERT INTO telemetry_gaps (run_id, incarnation, sequence, from_step, to_step, num_lost, event_id, at, log_offset)
VALUES (:run_id, :incarnation, :sequence, :from_step, :step, :num_lost, :event_id, :at, :log_offset)
ON CONFLICT DO NOTHING;
