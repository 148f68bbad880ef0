-- depends: 0009-policies 0010-forks
-- The rule by which a resumed run supersedes rows of its older incarnations: a row of an incarnation at a step is
-- superseded by every later incarnation that resumed from an earlier step.
-- A set-returning SQL function and not a view: the planner inlines it, so that each row costs one index lookup, and
-- it also works for an incarnation whose start is not projected yet.

CREATE FUNCTION superseding_incarnations(run text, number integer, at_step bigint) RETURNS SETOF incarnations
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT i.* FROM incarnations AS i WHERE i.run_id = run AND i.incarnation > number AND i.from_step < at_step
$$;
