-- What Tamiyo reads. All rows of one view are read in one REPEATABLE READ transaction.
-- LATERAL with LIMIT keeps a query to one look into an index for each run under way, whatever the planner thinks
-- of the tables: the first two run at every poll.

-- name: newest_boundaries
SELECT
    b.run_id, b.incarnation, b.boundary, b.step, b.log_offset, b.event_id, b.traceparent, b.at,
    NOT EXISTS (
        SELECT FROM jsonb_each_text(b.last_sequences) AS sent (topic, sequence)
        LEFT JOIN LATERAL (
            SELECT n.last_sequence FROM progress AS n
            WHERE n.run_id = b.run_id AND n.incarnation = b.incarnation AND n.topic = sent.topic
            LIMIT 1
        ) AS p ON true
        WHERE p.last_sequence IS NULL OR p.last_sequence < sent.sequence::bigint
    ) AS is_complete
FROM runs AS r
CROSS JOIN LATERAL (
    SELECT * FROM boundaries AS n
    WHERE n.run_id = r.run_id AND n.incarnation = r.incarnation
    ORDER BY n.boundary DESC LIMIT 1
) AS b
LEFT JOIN LATERAL (
    SELECT true AS is_decided FROM decisions AS n
    WHERE n.run_id = b.run_id AND n.incarnation = b.incarnation AND n.boundary = b.boundary
    LIMIT 1
) AS d ON true
WHERE r.status = 'running'
    AND r.told_at >= (SELECT max(n.told_at) FROM runs AS n WHERE n.status = 'running') - :abandoned_after::interval
    AND d.is_decided IS NULL
ORDER BY b.run_id;

-- name: is_behind$
-- Whether something of what was sent is not folded yet.
SELECT EXISTS (
    SELECT FROM unnest(:incarnations::integer[], :topics::text[], :sequences::bigint[])
        AS sent (incarnation, topic, sequence)
    LEFT JOIN LATERAL (
        SELECT n.last_sequence FROM progress AS n
        WHERE n.run_id = :run_id AND n.incarnation = sent.incarnation AND n.topic = sent.topic
        LIMIT 1
    ) AS p ON true
    WHERE p.last_sequence IS NULL OR p.last_sequence < sent.sequence
);

-- name: boundary^
SELECT
    b.run_id, b.incarnation, b.boundary, b.step, b.epoch, b.last_sequences, b.log_offset,
    i.from_step, i.seeds, r.hyperparameters
FROM boundaries AS b
LEFT JOIN incarnations AS i
    ON i.run_id = b.run_id AND i.incarnation = b.incarnation AND i.log_offset < b.log_offset
LEFT JOIN incarnations AS first
    ON first.run_id = b.run_id AND first.incarnation = 1 AND first.log_offset < b.log_offset
LEFT JOIN runs AS r ON r.run_id = first.run_id
WHERE b.run_id = :run_id AND b.incarnation = :incarnation AND b.boundary = :boundary;

-- name: older_line
-- The incarnations before this one, each with what its last boundary before it was superseded says of its lifecycle.
WITH taken AS (
    SELECT i.incarnation, min(i.from_step) OVER later AS until_step, min(i.log_offset) OVER later AS until_offset
    FROM incarnations AS i
    WHERE i.run_id = :run_id AND i.incarnation <= :incarnation AND i.log_offset < :log_offset
    WINDOW later AS (ORDER BY i.incarnation ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)
)
SELECT t.incarnation, b.lifecycle_sequence
FROM taken AS t
CROSS JOIN LATERAL (
    SELECT (n.last_sequences ->> 'control.kasmina.lifecycle')::bigint AS lifecycle_sequence
    FROM boundaries AS n
    WHERE n.run_id = :run_id AND n.incarnation = t.incarnation
        AND n.step <= t.until_step AND n.log_offset < t.until_offset
    ORDER BY n.boundary DESC LIMIT 1
) AS b
WHERE t.incarnation < :incarnation AND b.lifecycle_sequence IS NOT NULL;

-- name: layers
SELECT layer_id, ordinal, kind, num_features, num_parameters, num_seeds
FROM layers WHERE run_id = :run_id;

-- name: edges
SELECT source, target FROM edges WHERE run_id = :run_id;

-- name: lifecycle
SELECT m.incarnation, m.sequence, m.seen_from, m.step, m.layer_id, m.seed_id, m.to_stage, m.blueprint_id,
    m.num_parameters
FROM unnest(:incarnations::integer[], :sequences::bigint[]) AS line (incarnation, sequence)
JOIN lifecycle AS m
    ON m.run_id = :run_id AND m.incarnation = line.incarnation AND m.sequence <= line.sequence
WHERE m.seen_from <= line.sequence;

-- name: breakers
SELECT sequence, seen_from, layer_id, seed_id, to_state, num_failures
FROM breaker_changes
WHERE run_id = :run_id AND incarnation = :incarnation AND sequence <= :sequence AND seen_from <= :sequence;

-- name: rejections
SELECT seen_from, step, layer_id, seed_id
FROM rejections
WHERE run_id = :run_id AND incarnation = :incarnation AND sequence <= :sequence AND seen_from <= :sequence
    AND step > :after_step;

-- name: epochs
-- The live line: an older incarnation's epochs count up to where the next one took over, and if they came before it.
SELECT e.incarnation, e.sequence, e.epoch, e.step, e.metrics, e.log_offset, count(*) OVER () AS num_epochs
FROM epochs AS e
WHERE e.run_id = :run_id AND e.incarnation <= :incarnation AND e.log_offset < :log_offset
    AND NOT EXISTS (
        SELECT FROM incarnations AS i
        WHERE i.run_id = e.run_id AND i.incarnation > e.incarnation AND i.incarnation <= :incarnation
            AND i.log_offset < :log_offset
            AND (i.from_step < e.step OR i.from_epoch <= e.epoch OR i.log_offset < e.log_offset)
    )
ORDER BY e.step DESC, e.epoch DESC, e.incarnation DESC, e.sequence DESC
LIMIT :max_epochs;

-- name: gaps
SELECT from_step, to_step, num_lost, log_offset
FROM telemetry_gaps
WHERE run_id = :run_id AND incarnation = :incarnation AND log_offset < :log_offset AND to_step >= :from_step;

-- name: windows
SELECT layer_id, seed_id, step, 0::bigint AS late_from, 0::bigint AS log_offset, 0 AS place,
    num_signals, num_non_finite,
    sum_health_score, sum_activation_mean, sum_activation_std, sum_dead_ratio, sum_gradient_norm,
    count_health_score, count_activation_mean, count_activation_std, count_dead_ratio, count_gradient_norm
FROM health_windows
WHERE run_id = :run_id AND incarnation = :incarnation AND step = ANY(:steps::bigint[])
UNION ALL
SELECT layer_id, seed_id, step, late_from, log_offset, place,
    1, non_finite::integer,
    health_score, coalesce(activation_mean, 0), coalesce(activation_std, 0), coalesce(dead_ratio, 0),
    coalesce(gradient_norm, 0),
    1, num_nonnulls(activation_mean), num_nonnulls(activation_std), num_nonnulls(dead_ratio),
    num_nonnulls(gradient_norm)
FROM late_health_signals
WHERE run_id = :run_id AND incarnation = :incarnation AND step = ANY(:steps::bigint[]) AND late_from <= :sequence;

-- name: blueprint_positions
SELECT log_partition, next_offset FROM positions WHERE topic = 'innovation.blueprints';

-- name: kernels
-- Kernels that fit a layer of the run, of blueprints that were certified, at these offsets of innovation.blueprints.
SELECT k.blueprint_id, k.blueprint_version, k.kernel_sha256, k.size_bytes, k.target, k.num_features,
    k.num_parameters, k.log_partition, k.log_offset
FROM (SELECT DISTINCT kind, num_features FROM layers WHERE run_id = :run_id) AS l
JOIN kernels AS k ON k.target = l.kind AND k.num_features = l.num_features
CROSS JOIN LATERAL (
    SELECT n.change FROM blueprint_changes AS n
    WHERE n.blueprint_id = k.blueprint_id AND n.verdict = 'accepted'
        AND n.log_offset < (:offsets::bigint[])[n.log_partition + 1]
    ORDER BY n.log_offset DESC LIMIT 1
) AS c
WHERE k.log_offset < (:offsets::bigint[])[k.log_partition + 1] AND c.change = 'certify';

-- name: decisions_without_command
-- What a Tamiyo that died between decision and command left undone, among the newest decisions of each run under
-- way. The command says what the decision saw: that is in the view.
SELECT d.run_id, d.incarnation, d.boundary, d.step, d.action, d.layer_id, d.seed_id, d.blueprint_id,
    d.event_id, d.traceparent, d.view_digest, v.log_partition AS view_partition, v.log_offset AS view_offset
FROM runs AS r
CROSS JOIN LATERAL (
    SELECT * FROM decisions AS n
    WHERE n.run_id = r.run_id AND n.incarnation = r.incarnation AND n.action <> 'wait'
    ORDER BY n.boundary DESC LIMIT :look_back
) AS d
LEFT JOIN LATERAL (
    SELECT n.command_id FROM commands AS n WHERE n.decision_id = d.event_id LIMIT 1
) AS c ON true
CROSS JOIN LATERAL (
    SELECT n.log_partition, n.log_offset FROM views AS n
    WHERE n.run_id = d.run_id AND n.incarnation = d.incarnation AND n.boundary = d.boundary
    LIMIT 1
) AS v
WHERE r.status = 'running'
    AND r.told_at >= (SELECT max(n.told_at) FROM runs AS n WHERE n.status = 'running') - :abandoned_after::interval
    AND c.command_id IS NULL AND d.view_digest IS NOT NULL
ORDER BY d.run_id, d.boundary;
