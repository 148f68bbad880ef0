-- control.kasmina.* and innovation.field-reports: what was asked of seeds, and what became of them.

-- name: insert_transitions!
INSERT INTO lifecycle (
    run_id, incarnation, sequence, step, layer_id, seed_id, from_stage, to_stage, reason, blueprint_id, kernel_sha256,
    command_id, num_parameters, detail, is_impossible, event_id, causation_id, at, seen_from
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :sequence::bigint[], :step::bigint[], :layer_id::text[],
    :seed_id::integer[], :from_stage::text[], :to_stage::text[], :reason::text[], :blueprint_id::text[],
    :kernel_sha256::text[], :command_id::uuid[], :num_parameters::bigint[], :detail::text[],
    :is_impossible::boolean[], :event_id::uuid[], :causation_id::uuid[], :at::timestamptz[], :seen_from::bigint[]
)
ON CONFLICT DO NOTHING;

-- name: move_seeds!
INSERT INTO seeds (
    run_id, incarnation, layer_id, seed_id, stage, since_step, blueprint_id, kernel_sha256, num_parameters
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :layer_id::text[], :seed_id::integer[], :to_stage::text[],
    :step::bigint[], :blueprint_id::text[], :kernel_sha256::text[], :num_parameters::bigint[]
)
ON CONFLICT (run_id, incarnation, layer_id, seed_id) DO UPDATE SET
    stage = EXCLUDED.stage, since_step = EXCLUDED.since_step, blueprint_id = EXCLUDED.blueprint_id,
    kernel_sha256 = EXCLUDED.kernel_sha256, num_parameters = EXCLUDED.num_parameters
WHERE seeds.since_step <= EXCLUDED.since_step; -- a redriven event tells of the past

-- name: insert_rejections!
INSERT INTO rejections (
    run_id, incarnation, sequence, step, layer_id, seed_id, command_id, reason, detail, event_id, causation_id, at,
    seen_from
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :sequence::bigint[], :step::bigint[], :layer_id::text[],
    :seed_id::integer[], :command_id::uuid[], :reason::text[], :detail::text[], :event_id::uuid[],
    :causation_id::uuid[], :at::timestamptz[], :seen_from::bigint[]
)
ON CONFLICT DO NOTHING;

-- name: insert_breaker_changes!
INSERT INTO breaker_changes (
    run_id, incarnation, sequence, step, layer_id, seed_id, from_state, to_state, num_failures, detail, event_id,
    causation_id, at, seen_from
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :sequence::bigint[], :step::bigint[], :layer_id::text[],
    :seed_id::integer[], :from_state::text[], :to_state::text[], :num_failures::bigint[], :detail::text[],
    :event_id::uuid[], :causation_id::uuid[], :at::timestamptz[], :seen_from::bigint[]
)
ON CONFLICT DO NOTHING;

-- name: insert_commands!
INSERT INTO commands (
    command_id, run_id, incarnation, boundary, type, decision_id, layer_id, seed_id, blueprint_id, kernel_sha256,
    expires_at_step, causation_id, at
) SELECT * FROM unnest(
    :event_id::uuid[], :run_id::text[], :incarnation::integer[], :boundary::integer[], :type::text[],
    :decision_id::uuid[], :layer_id::text[], :seed_id::integer[], :blueprint_id::text[], :kernel_sha256::text[],
    :expires_at_step::bigint[], :causation_id::uuid[], :at::timestamptz[]
)
ON CONFLICT DO NOTHING;

-- name: insert_field_reports!
INSERT INTO field_reports (
    run_id, incarnation, sequence, step, layer_id, seed_id, blueprint_id, outcome, decision_id, command_id, method,
    metric, before, after, germinated_at_step, num_parameters, horizon_steps, num_draws, variance, is_placebo,
    num_parameters_host, flops_added, flops_host, event_id, causation_id, at
) SELECT * FROM unnest(
    :run_id::text[], :incarnation::integer[], :sequence::bigint[], :step::bigint[], :layer_id::text[],
    :seed_id::integer[], :blueprint_id::text[], :outcome::text[], :decision_id::uuid[], :command_id::uuid[],
    :method::text[], :metric::text[], :before::double precision[], :after::double precision[],
    :germinated_at_step::bigint[], :num_parameters::bigint[], :horizon_steps::bigint[], :num_draws::bigint[],
    :variance::double precision[], :is_placebo::boolean[], :num_parameters_host::bigint[], :flops_added::bigint[],
    :flops_host::bigint[], :event_id::uuid[], :causation_id::uuid[], :at::timestamptz[]
)
ON CONFLICT DO NOTHING;
