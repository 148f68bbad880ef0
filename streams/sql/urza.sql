-- What Urza's API shows; what its certifier looks up is in library.sql.

-- name: blueprints
SELECT blueprint_id, version, status, spec, changed_at FROM blueprints
ORDER BY blueprint_id LIMIT :limit OFFSET :offset;

-- name: blueprint^
SELECT blueprint_id, version, status, spec, changed_at FROM blueprints WHERE blueprint_id = :blueprint_id;

-- name: changes_of
SELECT event_id, change, expected_version, verdict, version_after, reason, at FROM blueprint_changes
WHERE blueprint_id = :blueprint_id ORDER BY log_partition, log_offset;

-- name: change^
SELECT event_id, blueprint_id, change, expected_version, verdict, version_after, reason, at
FROM blueprint_changes WHERE event_id = :event_id;

-- name: kernels
SELECT kernel_sha256, blueprint_id, blueprint_version, target, num_features, num_parameters, size_bytes, at
FROM kernels
WHERE (:blueprint_id::text IS NULL OR blueprint_id = :blueprint_id)
ORDER BY blueprint_id, target, num_features LIMIT :limit OFFSET :offset;

-- name: kernel^
SELECT kernel_sha256, size_bytes FROM kernels WHERE kernel_sha256 = :kernel_sha256;

-- name: runs
SELECT run_id, model, status, incarnation, step, epoch, results, started_at, ended_at FROM runs
ORDER BY started_at DESC, run_id LIMIT :limit OFFSET :offset;

-- name: run^
SELECT run_id, model, status, incarnation, step, epoch, hyperparameters, results, detail, started_at, ended_at
FROM runs WHERE run_id = :run_id;

-- name: seeds_of
SELECT s.layer_id, s.seed_id, s.stage, s.since_step, s.blueprint_id, s.num_parameters
FROM seeds AS s JOIN runs AS r USING (run_id, incarnation)
WHERE s.run_id = :run_id ORDER BY s.layer_id, s.seed_id;
