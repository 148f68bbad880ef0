-- innovation.blueprints: blueprints by the verdict of esper.schemas.verdicts, and kernels.

-- name: is_judged$
SELECT count(*) FROM blueprint_changes WHERE event_id = :event_id AND blueprint_id = :blueprint_id;

-- name: blueprint^
SELECT blueprint_id, version, status, spec FROM blueprints WHERE blueprint_id = :blueprint_id;

-- name: write_blueprint!
INSERT INTO blueprints (blueprint_id, version, status, spec, changed_at)
VALUES (:blueprint_id, :version, :status, :spec, :at)
ON CONFLICT (blueprint_id) DO UPDATE SET
    version = EXCLUDED.version, status = EXCLUDED.status, spec = EXCLUDED.spec,
    changed_at = EXCLUDED.changed_at;

-- name: insert_change!
INSERT INTO blueprint_changes (
    event_id, blueprint_id, change, expected_version, verdict, version_after, reason,
    log_partition, log_offset, at
) VALUES (
    :event_id, :blueprint_id, :change, :expected_version, :verdict, :version_after, :reason,
    :log_partition, :log_offset, :at
);

-- name: insert_kernel!
INSERT INTO kernels (
    kernel_sha256, blueprint_id, blueprint_version, target, num_features, num_parameters, size_bytes, event_id, at,
    log_partition, log_offset
) VALUES (
    :kernel_sha256, :blueprint_id, :blueprint_version, :target, :num_features, :num_parameters, :size_bytes,
    :event_id, :at, :log_partition, :log_offset
)
ON CONFLICT DO NOTHING;
