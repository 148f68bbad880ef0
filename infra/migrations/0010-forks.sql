-- depends: 0008-traces
-- How a fork was made, with its field report: null where the report is of another method.

ALTER TABLE field_reports ADD COLUMN horizon_steps bigint;
ALTER TABLE field_reports ADD COLUMN num_draws bigint;
ALTER TABLE field_reports ADD COLUMN variance double precision;
ALTER TABLE field_reports ADD COLUMN is_placebo boolean;
ALTER TABLE field_reports ADD COLUMN num_parameters_host bigint;
ALTER TABLE field_reports ADD COLUMN flops_added bigint;
ALTER TABLE field_reports ADD COLUMN flops_host bigint;
-- Folded again: what a report of a fork says is in no column yet.
TRUNCATE field_reports;
DELETE FROM positions WHERE topic = 'innovation.field-reports';
DELETE FROM progress WHERE topic = 'innovation.field-reports';
DELETE FROM dead_letters WHERE topic = 'innovation.field-reports';
DELETE FROM redriven WHERE topic = 'innovation.field-reports';
