-- The history of one seed: decisions, commands, transitions, rejections, breaker changes and field reports.

-- name: of_seed
SELECT at, 'decision' AS kind, incarnation, step, event_id, causation_id,
    action || coalesce(' ' || blueprint_id, '') || ' (p = ' || round(probability::numeric, 3)::text || ', policy '
    || policy_id || ' v' || policy_version || '): ' || reason AS description
FROM decisions WHERE run_id = :run_id AND layer_id = :layer_id AND seed_id = :seed_id
UNION ALL
SELECT c.at, 'command', c.incarnation, d.step, c.command_id, c.causation_id,
    c.type || coalesce(', kernel ' || left(c.kernel_sha256, 12), '') || ', until step ' || c.expires_at_step
FROM commands AS c LEFT JOIN decisions AS d ON d.event_id = c.decision_id
WHERE c.run_id = :run_id AND c.layer_id = :layer_id AND c.seed_id = :seed_id
UNION ALL
SELECT at, 'lifecycle', incarnation, step, event_id, causation_id,
    from_stage || ' -> ' || to_stage || ' (' || reason || ')'
    || CASE WHEN is_impossible THEN ' IMPOSSIBLE' ELSE '' END
    || CASE WHEN detail <> '' THEN ': ' || detail ELSE '' END
FROM lifecycle WHERE run_id = :run_id AND layer_id = :layer_id AND seed_id = :seed_id
UNION ALL
SELECT at, 'rejection', incarnation, step, event_id, causation_id, reason || ': ' || detail
FROM rejections WHERE run_id = :run_id AND layer_id = :layer_id AND seed_id = :seed_id
UNION ALL
SELECT at, 'breaker', incarnation, step, event_id, causation_id,
    from_state || ' -> ' || to_state || ' (' || num_failures || ' failures in a row)'
    || CASE WHEN detail <> '' THEN ': ' || detail ELSE '' END
FROM breaker_changes WHERE run_id = :run_id AND layer_id = :layer_id AND seed_id = :seed_id
UNION ALL
SELECT at, 'field report', incarnation, step, event_id, causation_id,
    outcome || ': ' || metric || ' ' || coalesce(round(before::numeric, 4)::text, '?') || ' -> '
    || coalesce(round(after::numeric, 4)::text, '?') || ' (' || method || '), '
    || num_parameters || ' parameters'
FROM field_reports WHERE run_id = :run_id AND layer_id = :layer_id AND seed_id = :seed_id
ORDER BY incarnation, step, at;

-- name: changed_seeds
SELECT layer_id, seed_id, min(step) AS first_step FROM lifecycle WHERE run_id = :run_id
GROUP BY layer_id, seed_id ORDER BY first_step, layer_id, seed_id;
