-- depends: 0007-reading
-- Whose request made a version of a blueprint, and in which trace: what follows from it goes on in that trace.
-- 0006 has these rows folded again, so none is left without what its event names.

ALTER TABLE blueprint_changes ADD COLUMN traceparent text COLLATE "C";
CREATE INDEX changes_that_made_a_version ON blueprint_changes (blueprint_id, version_after) WHERE verdict = 'accepted';
