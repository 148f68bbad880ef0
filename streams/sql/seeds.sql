-- control.kasmina.* and innovation.field-reports: commands to seeds, their transitions and their results.

-- name: insert_transitions!
INSERT INTO lifecycle {rows:
    run_id text, incarnation integer, sequence bigint, step bigint, layer_id text, seed_id integer,
    from_stage text, to_stage text, reason text, blueprint_id text, kernel_sha256 text, command_id uuid,
    num_parameters bigint, detail text, is_impossible boolean, event_id uuid, causation_id uuid, at timestamptz,
    seen_from bigint
} ON CONFLICT DO NOTHING;

-- name: upsert_seeds!
INSERT INTO seeds {rows:
    run_id text, incarnation integer, layer_id text, seed_id integer, stage text = :to_stage,
    since_step bigint = :step, blueprint_id text, kernel_sha256 text, num_parameters bigint
}
ON CONFLICT (run_id, incarnation, layer_id, seed_id) DO UPDATE SET
    stage = EXCLUDED.stage, since_step = EXCLUDED.since_step, blueprint_id = EXCLUDED.blueprint_id,
    kernel_sha256 = EXCLUDED.kernel_sha256, num_parameters = EXCLUDED.num_parameters
WHERE seeds.since_step <= EXCLUDED.since_step; -- a redriven event must not move a seed back

-- name: insert_rejections!
INSERT INTO rejections {rows:
    run_id text, incarnation integer, sequence bigint, step bigint, layer_id text, seed_id integer,
    command_id uuid, reason text, detail text, event_id uuid, causation_id uuid, at timestamptz, seen_from bigint
} ON CONFLICT DO NOTHING;

-- name: insert_breaker_changes!
INSERT INTO breaker_changes {rows:
    run_id text, incarnation integer, sequence bigint, step bigint, layer_id text, seed_id integer,
    from_state text, to_state text, num_failures bigint, detail text, event_id uuid, causation_id uuid,
    at timestamptz, seen_from bigint
} ON CONFLICT DO NOTHING;

-- name: insert_commands!
INSERT INTO commands {rows:
    command_id uuid = :event_id, run_id text, incarnation integer, boundary integer, type text, decision_id uuid,
    layer_id text, seed_id integer, blueprint_id text, kernel_sha256 text, expires_at_step bigint,
    causation_id uuid, at timestamptz
} ON CONFLICT DO NOTHING;

-- name: insert_field_reports!
INSERT INTO field_reports {rows:
    run_id text, incarnation integer, sequence bigint, step bigint, layer_id text, seed_id integer,
    blueprint_id text, outcome text, decision_id uuid, command_id uuid, method text, metric text,
    before double precision, after double precision, germinated_at_step bigint, num_parameters bigint,
    horizon_steps bigint, num_draws bigint, variance double precision, is_placebo boolean,
    num_parameters_host bigint, flops_added bigint, flops_host bigint, event_id uuid, causation_id uuid,
    at timestamptz
} ON CONFLICT DO NOTHING;
