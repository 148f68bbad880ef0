-- depends: 0006-views
-- What Urza's API reads by, so that a page costs the same however long the history grows.

CREATE INDEX kernels_in_order ON kernels (blueprint_id, target, num_features, kernel_sha256);
CREATE INDEX runs_by_start ON runs (started_at, run_id);
CREATE INDEX layers_in_order ON layers (run_id, ordinal, layer_id);
CREATE INDEX seeds_of_a_blueprint ON seeds (blueprint_id, run_id);
CREATE INDEX seeds_at_a_checkpoint ON incarnations USING gin (seeds jsonb_path_ops);
CREATE INDEX germinations_of_a_blueprint ON lifecycle (blueprint_id, run_id) WHERE to_stage = 'germinated';
CREATE INDEX reports_of_a_blueprint ON field_reports (blueprint_id, run_id, incarnation, sequence);
-- The chain of causes of one seed.
CREATE INDEX reports_of_a_seed ON field_reports (run_id, layer_id, seed_id);
CREATE INDEX decisions_of_a_seed ON decisions (run_id, layer_id, seed_id);
CREATE INDEX commands_of_a_seed ON commands (run_id, layer_id, seed_id);
CREATE INDEX rejections_of_a_seed ON rejections (run_id, layer_id, seed_id);
