-- telemetry.seed.health: tumbling windows, summed record by record. New windows are inserted by COPY.

-- name: windows_of
SELECT w.run_id, w.incarnation, w.step, w.layer_id, w.seed_id, w.logged_at, w.log_partition, w.first_offset,
    w.num_signals, w.num_non_finite,
    w.sum_health_score, w.sum_activation_mean, w.sum_activation_std, w.sum_dead_ratio, w.sum_gradient_norm,
    w.count_health_score, w.count_activation_mean, w.count_activation_std, w.count_dead_ratio, w.count_gradient_norm
FROM unnest(:run_ids::text[], :incarnations::integer[], :steps::bigint[], :layer_ids::text[])
    AS k (run_id, incarnation, step, layer_id)
JOIN health_windows AS w USING (run_id, incarnation, step, layer_id);

-- name: update_windows!
UPDATE health_windows AS w SET
    num_signals = g.num_signals, num_non_finite = g.num_non_finite,
    sum_health_score = g.sum_health_score, sum_activation_mean = g.sum_activation_mean,
    sum_activation_std = g.sum_activation_std, sum_dead_ratio = g.sum_dead_ratio,
    sum_gradient_norm = g.sum_gradient_norm,
    count_health_score = g.count_health_score, count_activation_mean = g.count_activation_mean,
    count_activation_std = g.count_activation_std, count_dead_ratio = g.count_dead_ratio,
    count_gradient_norm = g.count_gradient_norm
FROM unnest(
    :run_ids::text[], :incarnations::integer[], :steps::bigint[], :layer_ids::text[], :seed_ids::integer[],
    :logged_ats::timestamptz[], :num_signals::bigint[], :num_non_finites::bigint[],
    :sums_0::double precision[], :sums_1::double precision[], :sums_2::double precision[],
    :sums_3::double precision[], :sums_4::double precision[],
    :counts_0::bigint[], :counts_1::bigint[], :counts_2::bigint[], :counts_3::bigint[], :counts_4::bigint[]
) AS g (
    run_id, incarnation, step, layer_id, seed_id, logged_at, num_signals, num_non_finite,
    sum_health_score, sum_activation_mean, sum_activation_std, sum_dead_ratio, sum_gradient_norm,
    count_health_score, count_activation_mean, count_activation_std, count_dead_ratio, count_gradient_norm
)
WHERE w.run_id = g.run_id AND w.incarnation = g.incarnation AND w.step = g.step AND w.layer_id = g.layer_id
    AND w.seed_id = g.seed_id AND w.logged_at = g.logged_at;

-- name: insert_late_signals!
INSERT INTO late_health_signals {rows:
    run_id text, incarnation integer, step bigint, log_partition integer, log_offset bigint, place integer,
    logged_at timestamptz, late_from bigint, layer_id text, seed_id integer, non_finite boolean,
    health_score double precision, activation_mean double precision, activation_std double precision,
    dead_ratio double precision, gradient_norm double precision
} ON CONFLICT DO NOTHING;
