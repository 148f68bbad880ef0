-- telemetry.seed.health: tumbling windows, folded record by record.

-- name: windows_of
SELECT w.run_id, w.incarnation, w.layer_id, w.seed_id, w.step, w.num_signals, w.num_non_finite, w.sums, w.counts
FROM health_windows AS w
JOIN unnest(:run_ids::text[], :incarnations::integer[], :layer_ids::text[], :seed_ids::integer[], :steps::bigint[])
    AS k (run_id, incarnation, layer_id, seed_id, step)
    USING (run_id, incarnation, layer_id, seed_id, step);

-- name: write_window*!
INSERT INTO health_windows (
    run_id, incarnation, layer_id, seed_id, step, num_signals, num_non_finite, sums, counts
) VALUES (
    :run_id, :incarnation, :layer_id, :seed_id, :step, :num_signals, :num_non_finite, :sums, :counts
)
ON CONFLICT (run_id, incarnation, layer_id, seed_id, step) DO UPDATE SET
    num_signals = EXCLUDED.num_signals, num_non_finite = EXCLUDED.num_non_finite,
    sums = EXCLUDED.sums, counts = EXCLUDED.counts;
