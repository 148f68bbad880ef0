-- depends: 0004-health-partitions
-- What blueprints measured when they were certified, kernels that cannot be built, and what the certifier looks up.

-- Of two certificates of one version the first in the log counts: it is the row.
CREATE TABLE certificates (
    blueprint_id text COLLATE "C",
    blueprint_version integer,
    examiner text COLLATE "C" NOT NULL,
    checks jsonb NOT NULL,
    measurements jsonb NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (blueprint_id, blueprint_version)
);

CREATE TABLE kernel_refusals (
    blueprint_id text COLLATE "C",
    target text COLLATE "C",
    num_features integer,
    blueprint_version integer,
    reason text COLLATE "C" NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (blueprint_id, target, num_features, blueprint_version)
);

-- No change that was requested before this migration named a cause, so its null is what a rebuild gives.
ALTER TABLE blueprint_changes ADD COLUMN causation_id uuid;

CREATE INDEX blueprints_not_validated ON blueprints (changed_at, blueprint_id)
WHERE status IN ('proposed', 'compiled');
CREATE INDEX layers_by_width ON layers (kind, num_features);
CREATE INDEX commands_of_a_blueprint ON commands (blueprint_id, at) WHERE blueprint_id IS NOT NULL;
CREATE INDEX field_reports_of_a_blueprint ON field_reports (blueprint_id, command_id);
