-- depends: 0005-certificates
-- What graph views need: by what place in the log each row counts, and indexes for what Tamiyo asks at every poll.
-- The old rows do not say where they lay in the log: three topics, which are kept for ever, are folded again from zero.

TRUNCATE runs, incarnations, layers, edges, epochs, boundaries, checkpoints, telemetry_gaps,
    lifecycle, seeds, rejections, breaker_changes, blueprints, blueprint_changes, kernels;
DELETE FROM positions WHERE topic IN ('system.runs', 'control.kasmina.lifecycle', 'innovation.blueprints');
DELETE FROM progress WHERE topic IN ('system.runs', 'control.kasmina.lifecycle');
DELETE FROM dead_letters WHERE topic IN ('system.runs', 'control.kasmina.lifecycle', 'innovation.blueprints');
DELETE FROM redriven WHERE topic IN ('system.runs', 'control.kasmina.lifecycle', 'innovation.blueprints');

-- system.runs: what lies before a boundary in its partition counts in its view.
ALTER TABLE incarnations ADD COLUMN log_offset bigint NOT NULL;
ALTER TABLE incarnations ADD COLUMN from_epoch integer NOT NULL;
ALTER TABLE boundaries ADD COLUMN log_offset bigint NOT NULL;
ALTER TABLE epochs ADD COLUMN log_offset bigint NOT NULL;
ALTER TABLE telemetry_gaps ADD COLUMN log_offset bigint NOT NULL;

-- control.kasmina.lifecycle: a row counts in views of boundaries that name this sequence or a later one. It is the
-- event's own, but of an event that was redriven it is that after which it came.
ALTER TABLE lifecycle ADD COLUMN seen_from bigint NOT NULL;
ALTER TABLE rejections ADD COLUMN seen_from bigint NOT NULL;
ALTER TABLE breaker_changes ADD COLUMN seen_from bigint NOT NULL;

-- innovation.blueprints: a view names the offsets up to which it counts. Two partitions never feed one row.
ALTER TABLE kernels DROP CONSTRAINT kernels_pkey;
ALTER TABLE kernels ADD PRIMARY KEY (kernel_sha256, blueprint_id);
ALTER TABLE kernels ADD COLUMN log_partition integer NOT NULL;
ALTER TABLE kernels ADD COLUMN log_offset bigint NOT NULL;
ALTER TABLE blueprint_changes DROP CONSTRAINT blueprint_changes_pkey;
ALTER TABLE blueprint_changes ADD PRIMARY KEY (event_id, blueprint_id);
DROP INDEX changes_of_a_blueprint;
CREATE INDEX changes_of_a_blueprint ON blueprint_changes (blueprint_id, log_offset);

-- Signals that were redriven when later ones had been folded: they count in views of boundaries that name the
-- sequence late_from or a later one, so that no view changes after it was read. Empty as a rule.
CREATE TABLE late_health_signals (
    run_id text COLLATE "C",
    incarnation integer,
    step bigint, -- the first step of its window
    log_partition integer NOT NULL,
    log_offset bigint,
    place integer, -- in its record
    logged_at timestamptz NOT NULL,
    late_from bigint NOT NULL,
    layer_id text COLLATE "C" NOT NULL,
    seed_id integer NOT NULL,
    non_finite boolean NOT NULL,
    health_score double precision NOT NULL,
    activation_mean double precision,
    activation_std double precision,
    dead_ratio double precision,
    gradient_norm double precision,
    PRIMARY KEY (run_id, incarnation, step, log_offset, place)
);

-- What Tamiyo asks at every poll must not grow with the history: runs under way are found by an index, and those
-- that told nothing for long (their process died) are left out.
ALTER TABLE runs ADD COLUMN told_at timestamptz NOT NULL; -- the broker's time of the newest record that moved the run
CREATE INDEX runs_under_way ON runs (told_at) WHERE status = 'running';
CREATE INDEX decisions_to_carry_out ON decisions (run_id, incarnation, boundary) WHERE action <> 'wait';
