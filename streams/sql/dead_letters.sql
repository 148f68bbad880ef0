-- Dead letters: recorded in the transaction that moves the position, sent after its commit; and redriven origins.

-- name: insert_dead_letters!
INSERT INTO dead_letters {rows:
    topic text, log_partition integer, log_offset bigint, reason text, detail text, event_id text
} ON CONFLICT DO NOTHING;

-- name: insert_pending!
INSERT INTO pending_letters {rows:
    topic text, log_partition integer, log_offset bigint, key bytea, value bytea, headers text, timestamp_ms bigint
} ON CONFLICT DO NOTHING;

-- name: pending
SELECT topic, log_partition, log_offset, key, value, headers, timestamp_ms FROM pending_letters
WHERE topic = :topic AND log_partition = :log_partition AND refused IS NULL
ORDER BY log_offset LIMIT :limit;

-- name: all_pending
SELECT topic, log_partition, log_offset, key, value, headers, timestamp_ms FROM pending_letters;

-- name: counts_by_topic
SELECT topic, count(d.log_offset) AS num_dead, count(p.log_offset) FILTER (WHERE p.refused IS NULL) AS num_pending,
    count(p.refused) AS num_refused
FROM dead_letters AS d FULL JOIN pending_letters AS p USING (topic, log_partition, log_offset)
GROUP BY topic;

-- name: refused
SELECT topic, log_partition, log_offset, refused FROM pending_letters WHERE refused IS NOT NULL
ORDER BY topic, log_partition, log_offset;

-- name: delete_pending!
DELETE FROM pending_letters
WHERE topic = :topic AND log_partition = :log_partition AND log_offset = ANY(:offsets);

-- name: mark_refused!
UPDATE pending_letters SET refused = :reason
WHERE topic = :topic AND log_partition = :log_partition AND log_offset = :log_offset;

-- name: insert_redriven$
-- Only a record with a dead letter can be redriven. An event counts once, however many dead letters it has.
INSERT INTO redriven (topic, log_partition, log_offset, redriven_offset, event_id)
SELECT :topic, :log_partition, :log_offset, :redriven_offset, :event_id
WHERE EXISTS (
        SELECT FROM dead_letters
        WHERE topic = :topic AND log_partition = :log_partition AND log_offset = :log_offset
    )
    AND NOT EXISTS (
        SELECT FROM redriven
        WHERE topic = :topic AND log_partition = :log_partition AND event_id = :event_id
    )
ON CONFLICT DO NOTHING
RETURNING log_offset;

-- name: with_event_id
-- A partition's dead letters with a known event id, and whether that event was projected since.
SELECT
    log_offset, event_id,
    EXISTS (
        SELECT FROM redriven AS r
        WHERE r.topic = d.topic AND r.log_partition = d.log_partition AND r.event_id = d.event_id
    ) AS is_projected
FROM dead_letters AS d
WHERE topic = :topic AND log_partition = :log_partition AND event_id IS NOT NULL
ORDER BY log_offset DESC;

-- name: insert_redrives!
INSERT INTO redrives {rows:
    event_id uuid, topic text, log_partition integer, log_offset bigint, letter_offset bigint,
    redriven_offset bigint, redrive_id uuid, reason text, at timestamptz
} ON CONFLICT DO NOTHING;
