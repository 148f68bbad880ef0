"""Commands about the projections in Postgres: status, rebuild, verify, roles."""
