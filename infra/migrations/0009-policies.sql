-- depends: 0008-traces
-- Versions of policies: trained, evaluated, and which decides since when. The old rows of ``policies`` do not say when
-- the broker took them: their topic, which is kept for ever, is folded again from zero.

TRUNCATE policies;
DELETE FROM positions WHERE topic = 'control.tamiyo.policies';
DELETE FROM dead_letters WHERE topic = 'control.tamiyo.policies';
DELETE FROM redriven WHERE topic = 'control.tamiyo.policies';

-- Who decides: an activation, or a rollback, whose row names the version that it went back to. Two partitions never
-- feed one row.
ALTER TABLE policies DROP CONSTRAINT policies_pkey;
ALTER TABLE policies ADD PRIMARY KEY (activation_id, log_partition);
ALTER TABLE policies ADD COLUMN change text COLLATE "C" NOT NULL; -- activated, rolled_back
ALTER TABLE policies ADD COLUMN from_policy_id text COLLATE "C"; -- of a rollback
ALTER TABLE policies ADD COLUMN from_version integer;
ALTER TABLE policies ADD COLUMN by_settings boolean NOT NULL; -- a controller with a fixed policy told of itself
ALTER TABLE policies ADD COLUMN since timestamptz NOT NULL; -- the broker's time; of a redriven event its own
ALTER TABLE policies ADD COLUMN causation_id uuid;
CREATE INDEX policies_by_time ON policies (since, log_offset, log_partition) WHERE NOT by_settings;

-- Of two trainings under one version the first in the log counts: it is the row.
CREATE TABLE policy_versions (
    policy_id text COLLATE "C",
    policy_version integer,
    kind text COLLATE "C" NOT NULL,
    parent_version integer,
    weights_sha256 text COLLATE "C" NOT NULL,
    weights_size_bytes bigint NOT NULL,
    parameters jsonb NOT NULL,
    data jsonb NOT NULL,
    from_time_ms bigint,
    until_time_ms bigint,
    num_decisions bigint NOT NULL,
    figures jsonb NOT NULL,
    reason text COLLATE "C" NOT NULL,
    event_id uuid NOT NULL,
    causation_id uuid,
    at timestamptz NOT NULL,
    PRIMARY KEY (policy_id, policy_version)
);

CREATE TABLE policy_evaluations (
    policy_id text COLLATE "C",
    event_id uuid,
    policy_version integer NOT NULL,
    against_policy_id text COLLATE "C" NOT NULL,
    against_version integer NOT NULL,
    estimator text COLLATE "C" NOT NULL,
    estimate double precision,
    low double precision,
    high double precision,
    confidence double precision NOT NULL,
    effective_sample_size double precision NOT NULL,
    num_decisions bigint NOT NULL,
    held_out_runs jsonb NOT NULL,
    verdict text COLLATE "C" NOT NULL,
    reason text COLLATE "C" NOT NULL,
    log_offset bigint NOT NULL, -- a policy's events are in one partition
    causation_id uuid,
    at timestamptz NOT NULL,
    PRIMARY KEY (policy_id, event_id)
);
