-- depends:
-- The projections: rows folded from the log, and the position up to which each partition is folded.
-- Runs in the schema that search_path names, so that a rebuild can stand beside the live one.
-- No default clock, no serial, no random value: a rebuild must give the same rows.

CREATE TABLE cluster (
    only_one boolean PRIMARY KEY CHECK (only_one),
    cluster_id text COLLATE "C" NOT NULL
);

CREATE TABLE positions (
    topic text COLLATE "C",
    log_partition integer,
    next_offset bigint NOT NULL,
    PRIMARY KEY (topic, log_partition)
);

CREATE TABLE progress (
    run_id text COLLATE "C",
    incarnation integer,
    topic text COLLATE "C",
    last_sequence bigint NOT NULL,
    PRIMARY KEY (run_id, incarnation, topic)
);

CREATE TABLE dead_letters (
    topic text COLLATE "C",
    log_partition integer,
    log_offset bigint,
    reason text COLLATE "C" NOT NULL,
    detail text COLLATE "C" NOT NULL,
    PRIMARY KEY (topic, log_partition, log_offset)
);

CREATE TABLE runs (
    run_id text COLLATE "C" PRIMARY KEY,
    model text COLLATE "C" NOT NULL,
    status text COLLATE "C" NOT NULL,
    incarnation integer NOT NULL,
    step bigint NOT NULL,
    epoch integer NOT NULL,
    hyperparameters jsonb NOT NULL,
    results jsonb,
    detail text COLLATE "C" NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at timestamptz
);

CREATE TABLE incarnations (
    run_id text COLLATE "C",
    incarnation integer,
    from_incarnation integer,
    from_step bigint NOT NULL,
    seeds jsonb NOT NULL,
    command_offset bigint NOT NULL,
    event_id uuid NOT NULL,
    causation_id uuid,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation)
);

CREATE TABLE layers (
    run_id text COLLATE "C",
    layer_id text COLLATE "C",
    ordinal integer NOT NULL,
    kind text COLLATE "C" NOT NULL,
    num_features integer NOT NULL,
    num_parameters bigint NOT NULL,
    num_seeds integer NOT NULL,
    PRIMARY KEY (run_id, layer_id)
);

CREATE TABLE edges (
    run_id text COLLATE "C",
    source text COLLATE "C",
    target text COLLATE "C",
    PRIMARY KEY (run_id, source, target)
);

CREATE TABLE epochs (
    run_id text COLLATE "C",
    incarnation integer,
    sequence bigint,
    epoch integer NOT NULL,
    step bigint NOT NULL,
    metrics jsonb NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, sequence)
);

CREATE TABLE boundaries (
    run_id text COLLATE "C",
    incarnation integer,
    boundary integer,
    sequence bigint NOT NULL,
    step bigint NOT NULL,
    epoch integer NOT NULL,
    last_sequences jsonb NOT NULL,
    event_id uuid NOT NULL,
    traceparent text COLLATE "C",
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, boundary)
);

CREATE TABLE checkpoints (
    run_id text COLLATE "C",
    incarnation integer,
    sequence bigint,
    step bigint NOT NULL,
    epoch integer NOT NULL,
    sha256 text COLLATE "C" NOT NULL,
    size_bytes bigint NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, sequence)
);

CREATE TABLE telemetry_gaps (
    run_id text COLLATE "C",
    incarnation integer,
    sequence bigint,
    from_step bigint NOT NULL,
    to_step bigint NOT NULL,
    num_lost bigint NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, sequence)
);

-- Tumbling windows by step. Sums are added up record by record, in the order of the log.
CREATE TABLE health_windows (
    run_id text COLLATE "C",
    incarnation integer,
    layer_id text COLLATE "C",
    seed_id integer,
    step bigint,
    num_signals bigint NOT NULL,
    num_non_finite bigint NOT NULL,
    sums double precision[] NOT NULL,
    counts bigint[] NOT NULL,
    PRIMARY KEY (run_id, incarnation, layer_id, seed_id, step)
);

CREATE TABLE lifecycle (
    run_id text COLLATE "C",
    incarnation integer,
    sequence bigint,
    step bigint NOT NULL,
    layer_id text COLLATE "C" NOT NULL,
    seed_id integer NOT NULL,
    from_stage text COLLATE "C" NOT NULL,
    to_stage text COLLATE "C" NOT NULL,
    reason text COLLATE "C" NOT NULL,
    blueprint_id text COLLATE "C",
    kernel_sha256 text COLLATE "C",
    command_id uuid,
    num_parameters bigint NOT NULL,
    detail text COLLATE "C" NOT NULL,
    is_impossible boolean NOT NULL,
    event_id uuid NOT NULL,
    causation_id uuid,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, sequence)
);
CREATE INDEX lifecycle_of_a_seed ON lifecycle (run_id, layer_id, seed_id);

CREATE TABLE seeds (
    run_id text COLLATE "C",
    incarnation integer,
    layer_id text COLLATE "C",
    seed_id integer,
    stage text COLLATE "C" NOT NULL,
    since_step bigint NOT NULL,
    blueprint_id text COLLATE "C",
    kernel_sha256 text COLLATE "C",
    num_parameters bigint NOT NULL,
    PRIMARY KEY (run_id, incarnation, layer_id, seed_id)
);

CREATE TABLE rejections (
    run_id text COLLATE "C",
    incarnation integer,
    sequence bigint,
    step bigint NOT NULL,
    layer_id text COLLATE "C" NOT NULL,
    seed_id integer NOT NULL,
    command_id uuid NOT NULL,
    reason text COLLATE "C" NOT NULL,
    detail text COLLATE "C" NOT NULL,
    event_id uuid NOT NULL,
    causation_id uuid,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, sequence)
);

-- Of two decisions for one boundary the first in the log counts: it is the row.
CREATE TABLE decisions (
    run_id text COLLATE "C",
    incarnation integer,
    boundary integer,
    step bigint NOT NULL,
    action text COLLATE "C" NOT NULL,
    layer_id text COLLATE "C",
    seed_id integer,
    blueprint_id text COLLATE "C",
    probability double precision NOT NULL,
    policy_id text COLLATE "C" NOT NULL,
    policy_version integer NOT NULL,
    reason text COLLATE "C" NOT NULL,
    view_digest text COLLATE "C",
    stale boolean NOT NULL,
    event_id uuid NOT NULL,
    causation_id uuid,
    traceparent text COLLATE "C",
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, boundary)
);
CREATE INDEX decisions_by_event ON decisions (event_id);

CREATE TABLE views (
    run_id text COLLATE "C",
    incarnation integer,
    boundary integer,
    view_version integer NOT NULL,
    digest text COLLATE "C" NOT NULL,
    num_bytes integer NOT NULL,
    log_partition integer NOT NULL,
    log_offset bigint NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, boundary)
);

CREATE TABLE commands (
    command_id uuid PRIMARY KEY,
    run_id text COLLATE "C" NOT NULL,
    incarnation integer NOT NULL,
    boundary integer NOT NULL,
    type text COLLATE "C" NOT NULL,
    decision_id uuid NOT NULL,
    layer_id text COLLATE "C" NOT NULL,
    seed_id integer NOT NULL,
    blueprint_id text COLLATE "C",
    kernel_sha256 text COLLATE "C",
    expires_at_step bigint NOT NULL,
    causation_id uuid,
    at timestamptz NOT NULL
);
CREATE INDEX commands_of_a_decision ON commands (decision_id);

CREATE TABLE field_reports (
    run_id text COLLATE "C",
    incarnation integer,
    sequence bigint,
    step bigint NOT NULL,
    layer_id text COLLATE "C" NOT NULL,
    seed_id integer NOT NULL,
    blueprint_id text COLLATE "C" NOT NULL,
    outcome text COLLATE "C" NOT NULL,
    decision_id uuid NOT NULL,
    command_id uuid NOT NULL,
    method text COLLATE "C" NOT NULL,
    metric text COLLATE "C" NOT NULL,
    before double precision,
    after double precision,
    germinated_at_step bigint NOT NULL,
    num_parameters bigint NOT NULL,
    event_id uuid NOT NULL,
    causation_id uuid,
    at timestamptz NOT NULL,
    PRIMARY KEY (run_id, incarnation, sequence)
);

CREATE TABLE blueprints (
    blueprint_id text COLLATE "C" PRIMARY KEY,
    version integer NOT NULL,
    status text COLLATE "C" NOT NULL,
    spec jsonb NOT NULL,
    changed_at timestamptz NOT NULL
);

CREATE TABLE blueprint_changes (
    event_id uuid PRIMARY KEY,
    blueprint_id text COLLATE "C" NOT NULL,
    change text COLLATE "C" NOT NULL,
    expected_version integer NOT NULL,
    verdict text COLLATE "C" NOT NULL,
    version_after integer,
    reason text COLLATE "C" NOT NULL,
    log_partition integer NOT NULL,
    log_offset bigint NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX changes_of_a_blueprint ON blueprint_changes (blueprint_id);

CREATE TABLE kernels (
    kernel_sha256 text COLLATE "C" PRIMARY KEY,
    blueprint_id text COLLATE "C" NOT NULL,
    blueprint_version integer NOT NULL,
    target text COLLATE "C" NOT NULL,
    num_features integer NOT NULL,
    num_parameters bigint NOT NULL,
    size_bytes bigint NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX kernels_that_fit ON kernels (target, num_features);

CREATE TABLE policies (
    activation_id uuid PRIMARY KEY,
    policy_id text COLLATE "C" NOT NULL,
    policy_version integer NOT NULL,
    kind text COLLATE "C" NOT NULL,
    parameters jsonb NOT NULL,
    reason text COLLATE "C" NOT NULL,
    log_partition integer NOT NULL,
    log_offset bigint NOT NULL,
    at timestamptz NOT NULL
);
