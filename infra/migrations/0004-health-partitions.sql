-- depends: 0003-breakers
-- Health windows by the day on which the log had their first record, so that old ones go by dropping a table.
-- The old rows do not say where their first record lay: telemetry is folded again from the start of the log.

DROP TABLE health_windows;

CREATE TABLE health_windows (
    run_id text COLLATE "C",
    incarnation integer,
    layer_id text COLLATE "C",
    seed_id integer,
    step bigint,
    logged_at timestamptz, -- the broker's time of the first record; workers make the partitions
    log_partition integer NOT NULL,
    first_offset bigint NOT NULL, -- a window lies wholly inside a log that still holds this offset
    num_signals bigint NOT NULL,
    num_non_finite bigint NOT NULL,
    sum_health_score double precision NOT NULL,
    sum_activation_mean double precision NOT NULL,
    sum_activation_std double precision NOT NULL,
    sum_dead_ratio double precision NOT NULL,
    sum_gradient_norm double precision NOT NULL,
    count_health_score bigint NOT NULL,
    count_activation_mean bigint NOT NULL,
    count_activation_std bigint NOT NULL,
    count_dead_ratio bigint NOT NULL,
    count_gradient_norm bigint NOT NULL,
    PRIMARY KEY (run_id, incarnation, step, layer_id, seed_id, logged_at)
) PARTITION BY RANGE (logged_at);

-- The highest step that was folded: no window beyond it is stored yet. Telemetry's rows alone have it.
ALTER TABLE progress ADD COLUMN last_step bigint;

DELETE FROM positions WHERE topic = 'telemetry.seed.health';
DELETE FROM progress WHERE topic = 'telemetry.seed.health';
-- Or what was redriven would count as folded already. Letters stay: of those past retention no record is left to say so.
DELETE FROM redriven WHERE topic = 'telemetry.seed.health';
