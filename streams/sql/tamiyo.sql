-- control.tamiyo.*: what Tamiyo saw and chose. The first decision for a boundary counts.

-- name: insert_decision!
INSERT INTO decisions (
    run_id, incarnation, boundary, step, action, layer_id, seed_id, blueprint_id, probability,
    policy_id, policy_version, reason, view_digest, stale, event_id, causation_id, traceparent, at
) VALUES (
    :run_id, :incarnation, :boundary, :step, :action, :layer_id, :seed_id, :blueprint_id, :probability,
    :policy_id, :policy_version, :reason, :view_digest, :stale, :event_id, :causation_id, :traceparent, :at
)
ON CONFLICT DO NOTHING;

-- name: insert_view!
INSERT INTO views (
    run_id, incarnation, boundary, view_version, digest, num_bytes, log_partition, log_offset, event_id, at
) VALUES (
    :run_id, :incarnation, :boundary, :view_version, :digest, :num_bytes, :log_partition, :log_offset,
    :event_id, :at
)
ON CONFLICT DO NOTHING;

-- name: insert_activation!
INSERT INTO policies (
    activation_id, policy_id, policy_version, kind, parameters, reason, log_partition, log_offset, at
) VALUES (
    :activation_id, :policy_id, :policy_version, :kind, :parameters, :reason, :log_partition, :log_offset, :at
)
ON CONFLICT DO NOTHING;
