"""Commands about the projections: the tables in Postgres that stream workers derive from the log."""
