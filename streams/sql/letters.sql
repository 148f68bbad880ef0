-- Dead letters: noted with the position, sent once that is certain; and origins that were folded late.

-- name: note_dead_letter*!
INSERT INTO dead_letters (topic, log_partition, log_offset, reason, detail)
VALUES (:topic, :log_partition, :log_offset, :reason, :detail)
ON CONFLICT DO NOTHING;

-- name: add_pending*!
INSERT INTO pending_letters (topic, log_partition, log_offset, key, value, headers, timestamp_ms)
VALUES (:topic, :log_partition, :log_offset, :key, :value, :headers, :timestamp_ms)
ON CONFLICT DO NOTHING;

-- name: pending
SELECT topic, log_partition, log_offset, key, value, headers, timestamp_ms FROM pending_letters
WHERE topic = :topic AND log_partition = :log_partition
ORDER BY log_offset LIMIT :limit;

-- name: all_pending
SELECT topic, log_partition, log_offset, key, value, headers, timestamp_ms FROM pending_letters;

-- name: remove_pending!
DELETE FROM pending_letters
WHERE topic = :topic AND log_partition = :log_partition AND log_offset <= :log_offset;

-- name: note_redriven$
INSERT INTO redriven (topic, log_partition, log_offset, redriven_offset)
VALUES (:topic, :log_partition, :log_offset, :redriven_offset)
ON CONFLICT DO NOTHING
RETURNING log_offset;

-- name: insert_redrive!
INSERT INTO redrives (
    event_id, topic, log_partition, log_offset, letter_offset, redriven_offset, redrive_id, reason, at
) VALUES (
    :event_id, :topic, :log_partition, :log_offset, :letter_offset, :redriven_offset, :redrive_id, :reason, :at
)
ON CONFLICT DO NOTHING;
