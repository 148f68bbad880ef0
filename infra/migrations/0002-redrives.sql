-- depends: 0001-projections
-- Dead letters that were sent again: which origins were folded late, and what operators did.

-- An origin counts once, however often its letter is redriven.
CREATE TABLE redriven (
    topic text COLLATE "C",
    log_partition integer,
    log_offset bigint,
    redriven_offset bigint NOT NULL, -- or where a resend of the same event was folded
    event_id text COLLATE "C",
    PRIMARY KEY (topic, log_partition, log_offset)
);

-- What the record said of itself, so that a letter and a resend of the same event are known as one.
ALTER TABLE dead_letters ADD COLUMN event_id text COLLATE "C";

CREATE TABLE redrives (
    event_id uuid PRIMARY KEY,
    topic text COLLATE "C" NOT NULL,
    log_partition integer NOT NULL,
    log_offset bigint NOT NULL,
    letter_offset bigint NOT NULL,
    redriven_offset bigint NOT NULL,
    redrive_id uuid NOT NULL,
    reason text COLLATE "C" NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX redrives_of_a_topic ON redrives (topic, log_partition, log_offset);

-- Letters that were decided on in a transaction and are not in Kafka yet; no projection, empty as a rule.
CREATE TABLE pending_letters (
    topic text COLLATE "C",
    log_partition integer,
    log_offset bigint,
    key bytea,
    value bytea,
    headers text COLLATE "C" NOT NULL,
    timestamp_ms bigint NOT NULL,
    refused text COLLATE "C", -- why Kafka will never take it; it stays here
    PRIMARY KEY (topic, log_partition, log_offset)
);
