-- control.tamiyo.policies: the trained versions, their evaluations, and which version is active.

-- name: insert_changes!
INSERT INTO policies {rows:
    activation_id uuid, policy_id text, policy_version integer, kind text, parameters jsonb, reason text,
    log_partition integer, log_offset bigint, at timestamptz, change text, from_policy_id text,
    from_version integer, by_settings boolean, since timestamptz, causation_id uuid
} ON CONFLICT DO NOTHING;

-- name: insert_versions!
INSERT INTO policy_versions {rows:
    policy_id text, policy_version integer, kind text, parent_version integer, weights_sha256 text,
    weights_size_bytes bigint, parameters jsonb, data jsonb, from_time_ms bigint, until_time_ms bigint,
    num_decisions bigint, figures jsonb, reason text, event_id uuid, causation_id uuid, at timestamptz
} ON CONFLICT DO NOTHING;

-- name: insert_evaluations!
INSERT INTO policy_evaluations {rows:
    policy_id text, log_offset bigint, policy_version integer, against_policy_id text, against_version integer,
    estimator text, estimate double precision, low double precision, high double precision,
    confidence double precision, effective_sample_size double precision, num_decisions bigint, held_out_runs jsonb,
    verdict text, reason text, event_id uuid, causation_id uuid, at timestamptz
} ON CONFLICT DO NOTHING;

-- name: changes
-- Activations and rollbacks, newest first by broker time, over all policies. Activations that controllers with a
-- fixed policy (settings) report of themselves are included only on request.
SELECT
    p.activation_id, p.policy_id, p.policy_version, p.kind, p.parameters, p.reason, p.change, p.from_policy_id,
    p.from_version, p.by_settings, p.since, v.weights_sha256, v.weights_size_bytes,
    v.parameters AS trained_parameters
FROM policies AS p
LEFT JOIN policy_versions AS v
    ON v.policy_id = p.policy_id AND v.policy_version = p.policy_version AND v.kind = p.kind
WHERE NOT p.by_settings OR :include_by_settings::boolean
ORDER BY p.since DESC, p.log_offset DESC, p.log_partition DESC
LIMIT :num;

-- name: versions
SELECT policy_id, policy_version, kind, parent_version, weights_sha256, weights_size_bytes, parameters, data,
    from_time_ms, until_time_ms, num_decisions, figures, reason, at
FROM policy_versions ORDER BY policy_id, policy_version;

-- name: evaluations
SELECT policy_id, policy_version, against_policy_id, against_version, estimator, estimate, low, high, confidence,
    effective_sample_size, num_decisions, held_out_runs, verdict, reason, at
FROM policy_evaluations ORDER BY policy_id, log_offset;

-- name: forked
SELECT d.action, f.run_id, f.incarnation, f.sequence, f.step, f.layer_id, f.seed_id, f.blueprint_id, f.outcome,
    f.decision_id, f.command_id, f.method, f.metric, f.before, f.after, f.germinated_at_step, f.num_parameters,
    f.horizon_steps, f.num_draws, f.variance, f.is_placebo, f.num_parameters_host, f.flops_added, f.flops_host
FROM field_reports AS f
JOIN decisions AS d ON d.event_id = f.decision_id
WHERE f.method = 'fork' AND f.at >= :since
    AND d.policy_id = :policy_id AND d.policy_version = :policy_version
ORDER BY f.run_id, f.incarnation, f.sequence;
