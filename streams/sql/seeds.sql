-- control.kasmina.* and innovation.field-reports: what was asked of seeds, and what became of them.

-- name: insert_transition!
INSERT INTO lifecycle (
    run_id, incarnation, sequence, step, layer_id, seed_id, from_stage, to_stage, reason,
    blueprint_id, kernel_sha256, command_id, num_parameters, detail, is_impossible,
    event_id, causation_id, at, seen_from
) VALUES (
    :run_id, :incarnation, :sequence, :step, :layer_id, :seed_id, :from_stage, :to_stage, :reason,
    :blueprint_id, :kernel_sha256, :command_id, :num_parameters, :detail, :is_impossible,
    :event_id, :causation_id, :at, :seen_from
)
ON CONFLICT DO NOTHING;

-- name: move_seed!
INSERT INTO seeds (
    run_id, incarnation, layer_id, seed_id, stage, since_step, blueprint_id, kernel_sha256, num_parameters
) VALUES (
    :run_id, :incarnation, :layer_id, :seed_id, :to_stage, :step, :blueprint_id, :kernel_sha256, :num_parameters
)
ON CONFLICT (run_id, incarnation, layer_id, seed_id) DO UPDATE SET
    stage = EXCLUDED.stage, since_step = EXCLUDED.since_step, blueprint_id = EXCLUDED.blueprint_id,
    kernel_sha256 = EXCLUDED.kernel_sha256, num_parameters = EXCLUDED.num_parameters
WHERE seeds.since_step <= EXCLUDED.since_step; -- a redriven event tells of the past

-- name: insert_rejection!
INSERT INTO rejections (
    run_id, incarnation, sequence, step, layer_id, seed_id, command_id, reason, detail,
    event_id, causation_id, at, seen_from
) VALUES (
    :run_id, :incarnation, :sequence, :step, :layer_id, :seed_id, :command_id, :reason, :detail,
    :event_id, :causation_id, :at, :seen_from
)
ON CONFLICT DO NOTHING;

-- name: insert_breaker_change!
INSERT INTO breaker_changes (
    run_id, incarnation, sequence, step, layer_id, seed_id, from_state, to_state, num_failures, detail,
    event_id, causation_id, at, seen_from
) VALUES (
    :run_id, :incarnation, :sequence, :step, :layer_id, :seed_id, :from_state, :to_state, :num_failures, :detail,
    :event_id, :causation_id, :at, :seen_from
)
ON CONFLICT DO NOTHING;

-- name: insert_command!
INSERT INTO commands (
    command_id, run_id, incarnation, boundary, type, decision_id, layer_id, seed_id,
    blueprint_id, kernel_sha256, expires_at_step, causation_id, at
) VALUES (
    :event_id, :run_id, :incarnation, :boundary, :type, :decision_id, :layer_id, :seed_id,
    :blueprint_id, :kernel_sha256, :expires_at_step, :causation_id, :at
)
ON CONFLICT DO NOTHING;

-- name: insert_field_report!
INSERT INTO field_reports (
    run_id, incarnation, sequence, step, layer_id, seed_id, blueprint_id, outcome, decision_id,
    command_id, method, metric, before, after, germinated_at_step, num_parameters,
    event_id, causation_id, at
) VALUES (
    :run_id, :incarnation, :sequence, :step, :layer_id, :seed_id, :blueprint_id, :outcome, :decision_id,
    :command_id, :method, :metric, :before, :after, :germinated_at_step, :num_parameters,
    :event_id, :causation_id, :at
)
ON CONFLICT DO NOTHING;
