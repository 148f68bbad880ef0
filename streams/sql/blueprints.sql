-- innovation.blueprints: blueprints after the verdicts of esper.schemas.change_verdicts, certificates and kernels.

-- name: judged_changes
SELECT event_id, blueprint_id FROM blueprint_changes WHERE event_id = ANY(:event_ids);

-- name: blueprints_of
SELECT blueprint_id, version, status, spec FROM blueprints WHERE blueprint_id = ANY(:blueprint_ids);

-- name: upsert_blueprints!
INSERT INTO blueprints {rows:
    blueprint_id text, version integer, status text, spec jsonb, changed_at timestamptz = :at
}
ON CONFLICT (blueprint_id) DO UPDATE SET
    version = EXCLUDED.version, status = EXCLUDED.status, spec = EXCLUDED.spec,
    changed_at = EXCLUDED.changed_at;

-- name: insert_changes!
INSERT INTO blueprint_changes {rows:
    event_id uuid, blueprint_id text, change text, expected_version integer, verdict text, version_after integer,
    reason text, causation_id uuid, traceparent text, log_partition integer, log_offset bigint, at timestamptz
};

-- name: insert_kernels!
INSERT INTO kernels {rows:
    kernel_sha256 text, blueprint_id text, blueprint_version integer, target text, num_features integer,
    num_parameters bigint, size_bytes bigint, event_id uuid, at timestamptz, log_partition integer,
    log_offset bigint
} ON CONFLICT DO NOTHING;

-- name: insert_kernel_refusals!
INSERT INTO kernel_refusals {rows:
    blueprint_id text, target text, num_features integer, blueprint_version integer, reason text, event_id uuid,
    at timestamptz
} ON CONFLICT DO NOTHING;

-- name: insert_certificates!
INSERT INTO certificates {rows:
    blueprint_id text, blueprint_version integer, examiner text, checks jsonb, measurements jsonb, event_id uuid,
    at timestamptz
} ON CONFLICT DO NOTHING;
