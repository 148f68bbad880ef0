-- Queries of Urza's API; the certifier's queries are in library.sql.
-- Lists use keyset pagination: the :after_ parameters are the last row of the previous page, or sort before every row.
-- LATERAL with LIMIT 1 forces one index lookup per row, whatever the planner estimates.
-- A row is superseded where a later incarnation resumed from an earlier step: superseding_incarnations.

-- name: versions
-- How far each topic is projected, and into which tables: a cached response is valid for these values.
SELECT topic, sum(next_offset)::bigint AS total_offset, 'positions'::regclass::oid::bigint AS made_in
FROM positions GROUP BY topic;

-- name: blueprints
SELECT blueprint_id, version, status, spec, changed_at FROM blueprints
WHERE blueprint_id > :after_id AND status = ANY(:statuses)
    AND (:module::text IS NULL OR spec ->> 'module' = :module)
    AND (:target::text IS NULL OR spec -> 'targets' ? :target)
ORDER BY blueprint_id LIMIT :limit;

-- name: changes_of
SELECT event_id, blueprint_id, change, expected_version, verdict, version_after, reason, causation_id, log_offset, at
FROM blueprint_changes
WHERE blueprint_id = :blueprint_id AND log_offset > :after_offset
ORDER BY blueprint_id, log_offset LIMIT :limit;

-- name: changes
-- One event id with two blueprints is two changes: each partition of the topic has its own verdict.
SELECT event_id, blueprint_id, change, expected_version, verdict, version_after, reason, causation_id, log_offset, at
FROM blueprint_changes WHERE event_id = ANY(:event_ids::uuid[]) ORDER BY event_id, blueprint_id;

-- name: has_blueprints
SELECT blueprint_id FROM blueprints WHERE status = 'certified' LIMIT 1;

-- name: seeds_of_blueprint
-- The seeds that use a blueprint in the newest incarnation of each run. Until a resumed incarnation moves a seed,
-- the seed's state is that of the checkpoint.
SELECT * FROM (
    SELECT s.run_id, s.layer_id, s.seed_id, s.incarnation, s.stage, s.since_step, s.kernel_sha256
    FROM seeds AS s
    CROSS JOIN LATERAL (
        SELECT FROM runs AS r WHERE r.run_id = s.run_id AND r.incarnation = s.incarnation LIMIT 1
    ) AS live
    WHERE s.blueprint_id = :blueprint_id AND s.stage NOT IN ('dormant', 'cancelled', 'culled', 'rolled_back')
    UNION ALL
    SELECT i.run_id, e.layer_id, e.seed_id, i.incarnation, e.stage, e.stage_since_step, e.kernel_sha256
    FROM incarnations AS i
    CROSS JOIN LATERAL (
        SELECT FROM runs AS r WHERE r.run_id = i.run_id AND r.incarnation = i.incarnation LIMIT 1
    ) AS live
    CROSS JOIN LATERAL jsonb_to_recordset(i.seeds) AS e (
        layer_id text COLLATE "C", seed_id integer, stage text COLLATE "C", stage_since_step bigint,
        blueprint_id text COLLATE "C", kernel_sha256 text COLLATE "C"
    )
    WHERE i.seeds @> jsonb_build_array(jsonb_build_object('blueprint_id', :blueprint_id::text))
        AND e.blueprint_id = :blueprint_id
        AND e.stage NOT IN ('dormant', 'cancelled', 'culled', 'rolled_back')
        AND NOT EXISTS (
            SELECT FROM seeds AS s
            WHERE s.run_id = i.run_id AND s.incarnation = i.incarnation
                AND s.layer_id = e.layer_id AND s.seed_id = e.seed_id
        )
) AS current
WHERE (run_id, layer_id, seed_id) > (:after_run, :after_layer, :after_seed::integer)
ORDER BY run_id, layer_id, seed_id LIMIT :limit;

-- name: runs_of_blueprint
SELECT u.run_id, u.num_germinations, u.first_at, u.last_at, r.status, r.model,
    coalesce(f.num_fossilized, 0) AS num_fossilized, coalesce(f.num_given_up, 0) AS num_given_up
FROM (
    SELECT run_id, count(*) AS num_germinations, min(at) AS first_at, max(at) AS last_at
    FROM lifecycle
    WHERE blueprint_id = :blueprint_id AND to_stage = 'germinated' AND run_id > :after_run
    GROUP BY run_id ORDER BY run_id LIMIT :limit
) AS u
LEFT JOIN LATERAL (SELECT n.status, n.model FROM runs AS n WHERE n.run_id = u.run_id LIMIT 1) AS r ON true
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE outcome = 'fossilized') AS num_fossilized,
        count(*) FILTER (WHERE outcome <> 'fossilized') AS num_given_up
    FROM field_reports
    WHERE blueprint_id = :blueprint_id AND run_id = u.run_id AND method = 'before_after' -- one per seed that ended
) AS f ON true
ORDER BY u.run_id;

-- name: outcomes_of_blueprint
-- Field reports that are not superseded, aggregated. A gain is after - before, where both were measured.
SELECT f.outcome, f.method, f.metric, count(*) AS num_reports, count(DISTINCT f.run_id) AS num_runs,
    count(f.after - f.before) AS num_measured,
    avg(f.after - f.before) AS mean_gain, min(f.after - f.before) AS least_gain,
    max(f.after - f.before) AS greatest_gain, stddev_samp(f.after - f.before) AS deviation_of_gain,
    avg(f.num_parameters)::double precision AS mean_parameters, max(f.at) AS last_at
FROM field_reports AS f
WHERE f.blueprint_id = :blueprint_id
    AND NOT EXISTS (SELECT FROM superseding_incarnations(f.run_id, f.incarnation, f.step))
GROUP BY f.outcome, f.method, f.metric ORDER BY f.outcome, f.method, f.metric;

-- name: reports_of_blueprint
SELECT f.*,
    EXISTS (SELECT FROM superseding_incarnations(f.run_id, f.incarnation, f.step)) AS is_superseded
FROM field_reports AS f
WHERE f.blueprint_id = :blueprint_id
    AND (f.run_id, f.incarnation, f.sequence) > (:after_run, :after_incarnation::integer, :after_sequence::bigint)
ORDER BY f.run_id, f.incarnation, f.sequence LIMIT :limit;

-- name: kernels
SELECT kernel_sha256, blueprint_id, blueprint_version, target, num_features, num_parameters, size_bytes, at
FROM kernels
WHERE (blueprint_id, target, num_features, kernel_sha256)
        > (:after_blueprint, :after_target, :after_features::integer, :after_sha256)
    AND (:target::text IS NULL OR target = :target)
    AND (:num_features::integer IS NULL OR num_features = :num_features)
ORDER BY blueprint_id, target, num_features, kernel_sha256 LIMIT :limit;

-- name: kernels_of_blueprint
SELECT kernel_sha256, blueprint_id, blueprint_version, target, num_features, num_parameters, size_bytes, at
FROM kernels
WHERE blueprint_id = :blueprint_id
    AND (target, num_features, kernel_sha256) > (:after_target, :after_features::integer, :after_sha256)
    AND (:target::text IS NULL OR target = :target)
    AND (:num_features::integer IS NULL OR num_features = :num_features)
ORDER BY target, num_features, kernel_sha256 LIMIT :limit;

-- name: kernel^
SELECT kernel_sha256, size_bytes FROM kernels WHERE kernel_sha256 = :kernel_sha256;

-- name: runs
SELECT run_id, model, status, incarnation, step, epoch, results, started_at, ended_at FROM runs
WHERE (started_at, run_id) < (:after_at::timestamptz, :after_run) AND status = ANY(:statuses)
ORDER BY started_at DESC, run_id DESC LIMIT :limit;

-- name: run^
SELECT run_id, model, status, incarnation, step, epoch, hyperparameters, results, detail, started_at, ended_at
FROM runs WHERE run_id = :run_id;

-- name: incarnations_of
SELECT incarnation, from_incarnation, from_step, command_offset, event_id, causation_id, at
FROM incarnations WHERE run_id = :run_id AND incarnation > :after_incarnation
ORDER BY incarnation LIMIT :limit;

-- name: layers_of
SELECT layer_id, ordinal, kind, num_features, num_parameters, num_seeds
FROM layers WHERE run_id = :run_id AND (ordinal, layer_id) > (:after_ordinal::integer, :after_layer)
ORDER BY ordinal, layer_id LIMIT :limit;

-- name: edges_of
SELECT source, target FROM edges
WHERE run_id = :run_id AND (source, target) > (:after_source, :after_target)
ORDER BY source, target LIMIT :limit;

-- name: seeds_of
-- The seeds of the newest incarnation that moved, and those that it restored from its checkpoint.
SELECT * FROM (
    SELECT s.layer_id, s.seed_id, s.stage, s.since_step, s.blueprint_id, s.kernel_sha256, s.num_parameters
    FROM seeds AS s
    JOIN runs AS r ON r.run_id = s.run_id AND r.incarnation = s.incarnation
    WHERE s.run_id = :run_id
    UNION ALL
    SELECT e.layer_id, e.seed_id, e.stage, e.stage_since_step, e.blueprint_id, e.kernel_sha256,
        coalesce(k.num_parameters, 0)
    FROM incarnations AS i
    JOIN runs AS r ON r.run_id = i.run_id AND r.incarnation = i.incarnation
    CROSS JOIN LATERAL jsonb_to_recordset(i.seeds) AS e (
        layer_id text COLLATE "C", seed_id integer, stage text COLLATE "C", stage_since_step bigint,
        blueprint_id text COLLATE "C", kernel_sha256 text COLLATE "C"
    )
    LEFT JOIN kernels AS k ON k.kernel_sha256 = e.kernel_sha256
    WHERE i.run_id = :run_id
        AND NOT EXISTS (
            SELECT FROM seeds AS s
            WHERE s.run_id = i.run_id AND s.incarnation = i.incarnation
                AND s.layer_id = e.layer_id AND s.seed_id = e.seed_id
        )
) AS current
WHERE (layer_id, seed_id) > (:after_layer, :after_seed::integer)
    AND (:stage::text IS NULL OR stage = :stage)
ORDER BY layer_id, seed_id LIMIT :limit;

-- name: epochs_of
SELECT e.incarnation, e.sequence, e.epoch, e.step, e.metrics, e.event_id, e.at,
    EXISTS (SELECT FROM superseding_incarnations(e.run_id, e.incarnation, e.step)) AS is_superseded
FROM epochs AS e
WHERE e.run_id = :run_id
    AND (e.incarnation, e.sequence) > (:after_incarnation::integer, :after_sequence::bigint)
ORDER BY e.incarnation, e.sequence LIMIT :limit;

-- name: decisions_of
SELECT d.incarnation, d.boundary, d.step, d.action, d.layer_id, d.seed_id, d.blueprint_id, d.probability,
    d.policy_id, d.policy_version, d.reason, d.view_digest, d.stale, d.event_id, d.causation_id, d.at,
    EXISTS (SELECT FROM superseding_incarnations(d.run_id, d.incarnation, d.step)) AS is_superseded
FROM decisions AS d
WHERE d.run_id = :run_id
    AND (d.incarnation, d.boundary) > (:after_incarnation::integer, :after_boundary::integer)
    AND (:action::text IS NULL OR d.action = :action)
ORDER BY d.incarnation, d.boundary LIMIT :limit;

-- name: decision^
SELECT d.run_id, d.incarnation, d.boundary, d.step, d.action, d.layer_id, d.seed_id, d.blueprint_id, d.probability,
    d.policy_id, d.policy_version, d.reason, d.view_digest, d.stale, d.event_id, d.causation_id, d.at,
    EXISTS (SELECT FROM superseding_incarnations(d.run_id, d.incarnation, d.step)) AS is_superseded
FROM decisions AS d WHERE d.event_id = :event_id;

-- name: views_of
SELECT incarnation, boundary, view_version, digest, num_bytes, log_partition, log_offset, event_id, at
FROM views
WHERE run_id = :run_id AND (incarnation, boundary) > (:after_incarnation::integer, :after_boundary::integer)
ORDER BY incarnation, boundary LIMIT :limit;

-- name: reports_of
SELECT f.*,
    EXISTS (SELECT FROM superseding_incarnations(f.run_id, f.incarnation, f.step)) AS is_superseded
FROM field_reports AS f
WHERE f.run_id = :run_id
    AND (f.incarnation, f.sequence) > (:after_incarnation::integer, :after_sequence::bigint)
ORDER BY f.incarnation, f.sequence LIMIT :limit;

-- name: dead_letters
SELECT d.topic, d.log_partition, d.log_offset, d.reason, d.detail, d.event_id,
    EXISTS (
        SELECT FROM redriven AS r
        WHERE r.topic = d.topic AND r.log_partition = d.log_partition AND r.log_offset = d.log_offset
    ) AS is_redriven
FROM dead_letters AS d
WHERE (d.topic, d.log_partition, d.log_offset) > (:after_topic, :after_partition::integer, :after_offset::bigint)
    AND (:topic::text IS NULL OR d.topic = :topic)
ORDER BY d.topic, d.log_partition, d.log_offset LIMIT :limit;
