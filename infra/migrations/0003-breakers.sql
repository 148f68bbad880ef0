-- depends: 0002-redrives
-- Circuit breakers of seeds, as the trainers told of them.

CREATE TABLE breaker_changes (
    run_id text COLLATE "C",
    incarnation integer,
    sequence bigint,
    step bigint NOT NULL,
    layer_id text COLLATE "C" NOT NULL,
    seed_id integer NOT NULL,
    from_state text COLLATE "C" NOT NULL,
    to_state text COLLATE "C" NOT NULL,
    num_failures bigint NOT NULL,
    detail text COLLATE "C" NOT NULL,
    event_id uuid NOT NULL,
    causation_id uuid,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, sequence)
);
CREATE INDEX breaker_changes_of_a_seed ON breaker_changes (run_id, layer_id, seed_id);
