-- Queries of Tamiyo. All rows of one view are read in one REPEATABLE READ transaction.
-- LATERAL with LIMIT forces one index lookup per active run, whatever the planner estimates: the first two queries
-- run at every poll.

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
-- Whether any of the events that these sequences name is not projected yet.
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

-- The rows of many views at once: every query takes several boundaries, and ``n`` (from 1) names the boundary of a
-- row. OFFSET 0 keeps one index scan per boundary, whatever the planner estimates.

-- name: boundaries
SELECT
    k.n, b.run_id, b.incarnation, b.boundary, b.step, b.epoch, b.last_sequences, b.log_offset,
    i.from_step, i.seeds, r.hyperparameters
FROM unnest(:run_ids::text[], :incarnations::integer[], :boundaries::integer[])
    WITH ORDINALITY AS k (run_id, incarnation, boundary, n)
CROSS JOIN LATERAL (
    SELECT * FROM boundaries AS n
    WHERE n.run_id = k.run_id AND n.incarnation = k.incarnation AND n.boundary = k.boundary
    LIMIT 1
) AS b
LEFT JOIN LATERAL (
    SELECT n.from_step, n.seeds FROM incarnations AS n
    WHERE n.run_id = b.run_id AND n.incarnation = b.incarnation AND n.log_offset < b.log_offset
    LIMIT 1
) AS i ON true
LEFT JOIN LATERAL (
    SELECT n.hyperparameters
    FROM incarnations AS first
    JOIN runs AS n ON n.run_id = first.run_id
    WHERE first.run_id = b.run_id AND first.incarnation = 1 AND first.log_offset < b.log_offset
    LIMIT 1
) AS r ON true;

-- name: older_incarnations
-- The incarnations before each boundary's, with the lifecycle sequence of the last boundary that is not superseded.
SELECT k.n, q.incarnation, q.lifecycle_sequence
FROM unnest(:run_ids::text[], :incarnations::integer[], :log_offsets::bigint[])
    WITH ORDINALITY AS k (run_id, incarnation, log_offset, n)
CROSS JOIN LATERAL (
    WITH ends AS (
        SELECT i.incarnation, min(i.from_step) OVER later AS until_step, min(i.log_offset) OVER later AS until_offset
        FROM incarnations AS i
        WHERE i.run_id = k.run_id AND i.incarnation <= k.incarnation AND i.log_offset < k.log_offset
        WINDOW later AS (ORDER BY i.incarnation ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)
    )
    SELECT t.incarnation, b.lifecycle_sequence
    FROM ends AS t
    CROSS JOIN LATERAL (
        SELECT (n.last_sequences ->> 'control.kasmina.lifecycle')::bigint AS lifecycle_sequence
        FROM boundaries AS n
        WHERE n.run_id = k.run_id AND n.incarnation = t.incarnation
            AND n.step <= t.until_step AND n.log_offset < t.until_offset
        ORDER BY n.boundary DESC LIMIT 1
    ) AS b
    WHERE t.incarnation < k.incarnation AND b.lifecycle_sequence IS NOT NULL
) AS q;

-- name: layers
SELECT k.n, q.*
FROM unnest(:run_ids::text[]) WITH ORDINALITY AS k (run_id, n)
CROSS JOIN LATERAL (
    SELECT m.layer_id, m.ordinal, m.kind, m.num_features, m.num_parameters, m.num_seeds
    FROM layers AS m WHERE m.run_id = k.run_id
    OFFSET 0
) AS q;

-- name: edges
SELECT k.n, q.*
FROM unnest(:run_ids::text[]) WITH ORDINALITY AS k (run_id, n)
CROSS JOIN LATERAL (SELECT m.source, m.target FROM edges AS m WHERE m.run_id = k.run_id OFFSET 0) AS q;

-- name: lifecycle
-- ``ns`` names the boundary that each incarnation is read for.
SELECT k.n, q.*
FROM unnest(:ns::bigint[], :run_ids::text[], :incarnations::integer[], :sequences::bigint[])
    AS k (n, run_id, incarnation, sequence)
CROSS JOIN LATERAL (
    SELECT m.incarnation, m.sequence, m.seen_from, m.step, m.layer_id, m.seed_id, m.to_stage, m.blueprint_id,
        m.num_parameters
    FROM lifecycle AS m
    WHERE m.run_id = k.run_id AND m.incarnation = k.incarnation AND m.sequence <= k.sequence
        AND m.seen_from <= k.sequence
    OFFSET 0
) AS q;

-- name: breakers
SELECT k.n, q.*
FROM unnest(:run_ids::text[], :incarnations::integer[], :sequences::bigint[])
    WITH ORDINALITY AS k (run_id, incarnation, sequence, n)
CROSS JOIN LATERAL (
    SELECT m.sequence, m.seen_from, m.layer_id, m.seed_id, m.to_state, m.num_failures
    FROM breaker_changes AS m
    WHERE m.run_id = k.run_id AND m.incarnation = k.incarnation AND m.sequence <= k.sequence
        AND m.seen_from <= k.sequence
    OFFSET 0
) AS q;

-- name: rejections
SELECT k.n, q.*
FROM unnest(:run_ids::text[], :incarnations::integer[], :sequences::bigint[], :after_steps::bigint[])
    WITH ORDINALITY AS k (run_id, incarnation, sequence, after_step, n)
CROSS JOIN LATERAL (
    SELECT m.seen_from, m.step, m.layer_id, m.seed_id
    FROM rejections AS m
    WHERE m.run_id = k.run_id AND m.incarnation = k.incarnation AND m.sequence <= k.sequence
        AND m.seen_from <= k.sequence AND m.step > k.after_step
    OFFSET 0
) AS q;

-- name: epochs
-- As of the boundary's log offset: epochs of an older incarnation count up to the step and epoch from which a later one
-- resumed, if they precede it in the log.
SELECT k.n, q.*
FROM unnest(:run_ids::text[], :incarnations::integer[], :log_offsets::bigint[])
    WITH ORDINALITY AS k (run_id, incarnation, log_offset, n)
CROSS JOIN LATERAL (
    SELECT e.incarnation, e.sequence, e.epoch, e.step, e.metrics, e.log_offset, count(*) OVER () AS num_epochs
    FROM epochs AS e
    WHERE e.run_id = k.run_id AND e.incarnation <= k.incarnation AND e.log_offset < k.log_offset
        AND NOT EXISTS (
            SELECT FROM incarnations AS i
            WHERE i.run_id = e.run_id AND i.incarnation > e.incarnation AND i.incarnation <= k.incarnation
                AND i.log_offset < k.log_offset
                AND (i.from_step < e.step OR i.from_epoch <= e.epoch OR i.log_offset < e.log_offset)
        )
    ORDER BY e.step DESC, e.epoch DESC, e.incarnation DESC, e.sequence DESC
    LIMIT :max_epochs
) AS q;

-- name: gaps
SELECT k.n, q.*
FROM unnest(:run_ids::text[], :incarnations::integer[], :log_offsets::bigint[], :from_steps::bigint[])
    WITH ORDINALITY AS k (run_id, incarnation, log_offset, from_step, n)
CROSS JOIN LATERAL (
    SELECT m.from_step, m.to_step, m.num_lost, m.log_offset
    FROM telemetry_gaps AS m
    WHERE m.run_id = k.run_id AND m.incarnation = k.incarnation AND m.log_offset < k.log_offset
        AND m.to_step >= k.from_step
    OFFSET 0
) AS q;

-- name: windows
SELECT k.n, q.*
FROM unnest(:run_ids::text[], :incarnations::integer[], :sequences::bigint[], :first::bigint[], :second::bigint[])
    WITH ORDINALITY AS k (run_id, incarnation, sequence, first, second, n)
CROSS JOIN LATERAL (
    SELECT m.layer_id, m.seed_id, m.step, 0::bigint AS late_from, 0::bigint AS log_offset, 0 AS place,
        m.num_signals, m.num_non_finite,
        m.sum_health_score, m.sum_activation_mean, m.sum_activation_std, m.sum_dead_ratio, m.sum_gradient_norm,
        m.count_health_score, m.count_activation_mean, m.count_activation_std, m.count_dead_ratio,
        m.count_gradient_norm
    FROM health_windows AS m
    WHERE m.run_id = k.run_id AND m.incarnation = k.incarnation AND m.step = ANY(ARRAY[k.first, k.second])
    UNION ALL
    SELECT m.layer_id, m.seed_id, m.step, m.late_from, m.log_offset, m.place,
        1, m.non_finite::integer,
        m.health_score, coalesce(m.activation_mean, 0), coalesce(m.activation_std, 0), coalesce(m.dead_ratio, 0),
        coalesce(m.gradient_norm, 0),
        1, num_nonnulls(m.activation_mean), num_nonnulls(m.activation_std), num_nonnulls(m.dead_ratio),
        num_nonnulls(m.gradient_norm)
    FROM late_health_signals AS m
    WHERE m.run_id = k.run_id AND m.incarnation = k.incarnation AND m.step = ANY(ARRAY[k.first, k.second])
        AND m.late_from <= k.sequence
) AS q;

-- name: blueprint_positions
SELECT log_partition, next_offset FROM positions WHERE topic = 'innovation.blueprints';

-- name: kernels
-- Kernels for these layers of blueprints that are certified as of these offsets of innovation.blueprints.
SELECT k.blueprint_id, k.blueprint_version, k.kernel_sha256, k.size_bytes, k.target, k.num_features,
    k.num_parameters, k.log_partition, k.log_offset
FROM unnest(:kinds::text[], :widths::integer[]) AS l (kind, num_features)
CROSS JOIN LATERAL (
    SELECT * FROM kernels AS m WHERE m.target = l.kind AND m.num_features = l.num_features
    OFFSET 0
) AS k
CROSS JOIN LATERAL (
    SELECT n.change FROM blueprint_changes AS n
    WHERE n.blueprint_id = k.blueprint_id AND n.verdict = 'accepted'
        AND n.log_offset < (:offsets::bigint[])[n.log_partition + 1]
    ORDER BY n.log_offset DESC LIMIT 1
) AS c
WHERE k.log_offset < (:offsets::bigint[])[k.log_partition + 1] AND c.change = 'certify';

-- name: decisions_without_command
-- Decisions whose command is missing, since Tamiyo stopped between the two, among the newest decisions of each active
-- run. The view is needed to make the command.
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
