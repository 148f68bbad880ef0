-- Urza's work queues: blueprints to examine and kernels to build, with their results.

-- name: not_validated
-- Longest waiting first, without those that this process answered and the projection does not show yet.
-- The cause is the change that created the version.
SELECT b.blueprint_id, b.version, b.status, b.spec, c.event_id AS cause_id, c.traceparent
FROM blueprints AS b
LEFT JOIN LATERAL (
    SELECT n.event_id, n.traceparent FROM blueprint_changes AS n
    WHERE n.blueprint_id = b.blueprint_id AND n.version_after = b.version AND n.verdict = 'accepted' LIMIT 1
) AS c ON true
WHERE b.status IN ('proposed', 'compiled')
    AND NOT EXISTS (
        SELECT FROM unnest(:answered_ids::text[], :answered_versions::integer[]) AS a (id, version)
        WHERE a.id = b.blueprint_id AND a.version = b.version
    )
ORDER BY b.changed_at, b.blueprint_id LIMIT :limit;

-- name: num_validated$
SELECT count(*) FROM blueprints
WHERE blueprint_id = ANY(:blueprint_ids) AND status NOT IN ('proposed', 'compiled');

-- name: wanted_kernels
-- Every certified blueprint at every width that a run has, unless its kernel exists or was refused. A loose index
-- scan finds the widths: the cost grows with their number, not with the number of runs. The cause is the change that
-- certified the blueprint.
WITH RECURSIVE widths AS (
    (SELECT kind, num_features FROM layers ORDER BY kind, num_features LIMIT 1)
    UNION ALL
    SELECT next.kind, next.num_features
    FROM widths AS w
    CROSS JOIN LATERAL (
        SELECT l.kind, l.num_features FROM layers AS l
        WHERE (l.kind, l.num_features) > (w.kind, w.num_features)
        ORDER BY l.kind, l.num_features LIMIT 1
    ) AS next
)
SELECT b.blueprint_id, b.version, b.spec, w.kind, w.num_features, c.event_id AS cause_id, c.traceparent
FROM blueprints AS b
JOIN widths AS w ON b.spec -> 'targets' ? w.kind
LEFT JOIN LATERAL (
    SELECT n.event_id, n.traceparent FROM blueprint_changes AS n
    WHERE n.blueprint_id = b.blueprint_id AND n.version_after = b.version AND n.verdict = 'accepted' LIMIT 1
) AS c ON true
WHERE b.status = 'certified'
    AND NOT EXISTS (
        SELECT FROM kernels AS k
        WHERE k.blueprint_id = b.blueprint_id AND k.target = w.kind AND k.num_features = w.num_features
    )
    AND NOT EXISTS (
        SELECT FROM kernel_refusals AS r
        WHERE r.blueprint_id = b.blueprint_id AND r.target = w.kind AND r.num_features = w.num_features
    )
ORDER BY b.blueprint_id, w.kind, w.num_features LIMIT :limit;

-- name: verdicts
SELECT event_id, verdict, version_after FROM blueprint_changes WHERE event_id = ANY(:event_ids);

-- name: versions
SELECT blueprint_id, version, status FROM blueprints WHERE blueprint_id = ANY(:blueprint_ids);

-- name: by_status
SELECT blueprint_id, version, status, spec, changed_at FROM blueprints
WHERE :status::text IS NULL OR status = :status
ORDER BY blueprint_id LIMIT :limit OFFSET :offset;

-- name: blueprint^
SELECT blueprint_id, version, status, spec, changed_at FROM blueprints WHERE blueprint_id = :blueprint_id;

-- name: history
-- In log order: a blueprint's changes are in one partition. The cause is a certificate or another event.
SELECT event_id, change, expected_version, verdict, version_after, reason, causation_id, at
FROM blueprint_changes WHERE blueprint_id = :blueprint_id ORDER BY log_partition, log_offset;

-- name: certificates
-- One page after the row that the :after_ parameters name; every row without a limit. The same holds for refusals.
SELECT blueprint_version, examiner, checks, measurements, event_id, at
FROM certificates WHERE blueprint_id = :blueprint_id AND blueprint_version > :after_version
ORDER BY blueprint_version LIMIT :limit;

-- name: kernels
SELECT kernel_sha256, blueprint_version, target, num_features, num_parameters, size_bytes, event_id, at
FROM kernels WHERE blueprint_id = :blueprint_id ORDER BY target, num_features, kernel_sha256;

-- name: refusals
SELECT blueprint_version, target, num_features, reason, event_id, at
FROM kernel_refusals
WHERE blueprint_id = :blueprint_id
    AND (target, num_features, blueprint_version) > (:after_target, :after_features::integer, :after_version::integer)
ORDER BY target, num_features, blueprint_version LIMIT :limit;

-- name: uses
-- The commands that name a blueprint, with the field report of each; without one while the seed has not ended.
SELECT c.run_id, c.incarnation, c.layer_id, c.seed_id, c.command_id, c.decision_id, c.kernel_sha256, c.at,
    f.outcome, f.method, f.metric, f.before, f.after
FROM commands AS c
LEFT JOIN field_reports AS f
    ON f.blueprint_id = c.blueprint_id AND f.command_id = c.command_id AND f.method = 'before_after'
WHERE c.blueprint_id = :blueprint_id
ORDER BY c.at DESC, c.command_id LIMIT :limit OFFSET :offset;
