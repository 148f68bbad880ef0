-- What Tamiyo reads. All rows of one view are read in one REPEATABLE READ transaction.

-- name: newest_boundaries
SELECT DISTINCT ON (b.run_id)
    b.run_id, b.incarnation, b.boundary, b.step, b.event_id, b.traceparent, b.at,
    NOT EXISTS (
        SELECT FROM jsonb_each_text(b.last_sequences) AS sent (topic, sequence)
        LEFT JOIN progress AS p
            ON p.run_id = b.run_id AND p.incarnation = b.incarnation AND p.topic = sent.topic
        WHERE p.last_sequence IS NULL OR p.last_sequence < sent.sequence::bigint
    ) AS is_complete,
    EXISTS (
        SELECT FROM decisions AS d
        WHERE d.run_id = b.run_id AND d.incarnation = b.incarnation AND d.boundary = b.boundary
    ) AS is_decided
FROM boundaries AS b
JOIN runs AS r ON r.run_id = b.run_id AND r.incarnation = b.incarnation
WHERE r.status = 'running'
ORDER BY b.run_id, b.boundary DESC;

-- name: boundary^
SELECT run_id, incarnation, boundary, step, epoch, last_sequences
FROM boundaries
WHERE run_id = :run_id AND incarnation = :incarnation AND boundary = :boundary;

-- name: layers
SELECT layer_id, ordinal, kind, num_features, num_parameters, num_seeds
FROM layers WHERE run_id = :run_id;

-- name: edges
SELECT source, target FROM edges WHERE run_id = :run_id;

-- name: resumed_seeds$
SELECT seeds FROM incarnations WHERE run_id = :run_id AND incarnation = :incarnation;

-- name: lifecycle
SELECT sequence, step, layer_id, seed_id, to_stage, blueprint_id, num_parameters
FROM lifecycle WHERE run_id = :run_id AND incarnation = :incarnation AND sequence <= :sequence;

-- name: epochs
-- The live line: an older incarnation's epochs count up to where the next one took over.
SELECT e.epoch, e.step, e.metrics
FROM epochs AS e
WHERE e.run_id = :run_id AND e.incarnation <= :incarnation AND e.step <= :step
    AND NOT EXISTS (
        SELECT FROM incarnations AS i
        WHERE i.run_id = e.run_id AND i.incarnation > e.incarnation
            AND i.incarnation <= :incarnation AND i.from_step < e.step
    );

-- name: windows
SELECT layer_id, seed_id, step, num_signals, num_non_finite,
    ARRAY[sum_health_score, sum_activation_mean, sum_activation_std, sum_dead_ratio, sum_gradient_norm] AS sums,
    ARRAY[
        count_health_score, count_activation_mean, count_activation_std, count_dead_ratio, count_gradient_norm
    ] AS counts
FROM health_windows
WHERE run_id = :run_id AND incarnation = :incarnation AND step = :step;

-- name: kernels
SELECT k.blueprint_id, k.blueprint_version, k.kernel_sha256, k.size_bytes, k.target, k.num_features,
    k.num_parameters
FROM kernels AS k
JOIN blueprints AS b USING (blueprint_id)
WHERE b.status = 'certified'
    AND EXISTS (
        SELECT FROM layers AS l
        WHERE l.run_id = :run_id AND l.kind = k.target AND l.num_features = k.num_features
    );

-- name: decisions_without_command
-- What a Tamiyo that died between decision and command left undone.
SELECT d.run_id, d.incarnation, d.boundary, d.step, d.action, d.layer_id, d.seed_id, d.blueprint_id,
    d.event_id, d.traceparent,
    k.blueprint_version, k.kernel_sha256, k.size_bytes,
    s.stage
FROM decisions AS d
JOIN runs AS r ON r.run_id = d.run_id AND r.incarnation = d.incarnation AND r.status = 'running'
JOIN layers AS l ON l.run_id = d.run_id AND l.layer_id = d.layer_id
LEFT JOIN kernels AS k
    ON k.blueprint_id = d.blueprint_id AND k.target = l.kind AND k.num_features = l.num_features
LEFT JOIN seeds AS s
    ON s.run_id = d.run_id AND s.incarnation = d.incarnation AND s.layer_id = d.layer_id AND s.seed_id = d.seed_id
WHERE d.action <> 'wait'
    AND NOT EXISTS (SELECT FROM commands AS c WHERE c.decision_id = d.event_id)
ORDER BY d.run_id, d.boundary;

-- name: active_policy^
SELECT policy_id, policy_version, parameters FROM policies
WHERE policy_id = :policy_id
ORDER BY log_partition, log_offset DESC LIMIT 1;
