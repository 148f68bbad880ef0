-- control.tamiyo.views and .decisions: recorded views and decisions. The first decision for a boundary counts.

-- name: insert_decisions!
INSERT INTO decisions {rows:
    run_id text, incarnation integer, boundary integer, step bigint, action text, layer_id text, seed_id integer,
    blueprint_id text, probability double precision, policy_id text, policy_version integer, reason text,
    view_digest text, stale boolean, event_id uuid, causation_id uuid, traceparent text, at timestamptz
} ON CONFLICT DO NOTHING;

-- name: insert_views!
INSERT INTO views {rows:
    run_id text, incarnation integer, boundary integer, view_version integer, digest text, num_bytes integer,
    log_partition integer, log_offset bigint, event_id uuid, at timestamptz
} ON CONFLICT DO NOTHING;
