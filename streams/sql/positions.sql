-- The position of each partition, and the progress of each incarnation.

-- name: lock_position^
-- ``live_table`` changes when a rebuild is swapped in.
SELECT next_offset, tableoid::bigint AS live_table FROM positions
WHERE topic = :topic AND log_partition = :log_partition
FOR UPDATE;

-- name: insert_position!
INSERT INTO positions (topic, log_partition, next_offset)
VALUES (:topic, :log_partition, :next_offset)
ON CONFLICT DO NOTHING;

-- name: update_position!
UPDATE positions SET next_offset = :next_offset
WHERE topic = :topic AND log_partition = :log_partition;

-- name: all_positions
SELECT topic, log_partition, next_offset FROM positions;

-- name: progress_of
SELECT run_id, incarnation, last_sequence, last_step FROM progress
WHERE topic = :topic AND run_id = ANY(:run_ids);

-- name: upsert_progress!
INSERT INTO progress (run_id, incarnation, topic, last_sequence, last_step)
SELECT r.run_id, r.incarnation, :topic, r.last_sequence, r.last_step
FROM unnest(:run_ids::text[], :incarnations::integer[], :last_sequences::bigint[], :last_steps::bigint[])
    AS r (run_id, incarnation, last_sequence, last_step)
ON CONFLICT (run_id, incarnation, topic) DO UPDATE SET
    last_sequence = EXCLUDED.last_sequence, last_step = EXCLUDED.last_step;

-- name: cluster_id$
SELECT cluster_id FROM cluster;

-- name: insert_cluster!
INSERT INTO cluster (only_one, cluster_id) VALUES (true, :cluster_id)
ON CONFLICT DO NOTHING;
