-- Dead letters: noted with the position, sent once that is certain; and origins that were folded late.

-- name: note_dead_letters!
INSERT INTO dead_letters (
    topic, log_partition, log_offset, reason, detail, event_id
) SELECT * FROM unnest(
    :topic::text[], :log_partition::integer[], :log_offset::bigint[], :reason::text[], :detail::text[],
    :event_id::text[]
)
ON CONFLICT DO NOTHING;

-- name: add_pending!
INSERT INTO pending_letters (
    topic, log_partition, log_offset, key, value, headers, timestamp_ms
) SELECT * FROM unnest(
    :topic::text[], :log_partition::integer[], :log_offset::bigint[], :key::bytea[], :value::bytea[],
    :headers::text[], :timestamp_ms::bigint[]
)
ON CONFLICT DO NOTHING;

-- name: pending
SELECT topic, log_partition, log_offset, key, value, headers, timestamp_ms FROM pending_letters
WHERE topic = :topic AND log_partition = :log_partition AND refused IS NULL
ORDER BY log_offset LIMIT :limit;

-- name: all_pending
SELECT topic, log_partition, log_offset, key, value, headers, timestamp_ms FROM pending_letters;

-- name: letter_counts
SELECT topic, count(d.log_offset) AS num_dead, count(p.log_offset) FILTER (WHERE p.refused IS NULL) AS num_pending,
    count(p.refused) AS num_refused
FROM dead_letters AS d FULL JOIN pending_letters AS p USING (topic, log_partition, log_offset)
GROUP BY topic;

-- name: refused
SELECT topic, log_partition, log_offset, refused FROM pending_letters WHERE refused IS NOT NULL
ORDER BY topic, log_partition, log_offset;

-- name: remove_pending!
DELETE FROM pending_letters
WHERE topic = :topic AND log_partition = :log_partition AND log_offset = ANY(:offsets);

-- name: refuse_pending!
UPDATE pending_letters SET refused = :reason
WHERE topic = :topic AND log_partition = :log_partition AND log_offset = :log_offset;

-- name: note_redriven$
-- Only what has a letter can be redriven, and an event counts once, whatever letters it has.
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

-- name: letters_of
-- The letters of a partition that said which event they are, and whether that was folded meanwhile.
SELECT
    log_offset, event_id,
    EXISTS (
        SELECT FROM redriven AS r
        WHERE r.topic = d.topic AND r.log_partition = d.log_partition AND r.event_id = d.event_id
    ) AS is_folded
FROM dead_letters AS d
WHERE topic = :topic AND log_partition = :log_partition AND event_id IS NOT NULL
ORDER BY log_offset DESC;

-- name: insert_redrives!
INSERT INTO redrives (
    event_id, topic, log_partition, log_offset, letter_offset, redriven_offset, redrive_id, reason, at
) SELECT * FROM unnest(
    :event_id::uuid[], :topic::text[], :log_partition::integer[], :log_offset::bigint[], :letter_offset::bigint[],
    :redriven_offset::bigint[], :redrive_id::uuid[], :reason::text[], :at::timestamptz[]
)
ON CONFLICT DO NOTHING;
