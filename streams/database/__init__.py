"""Postgres: connections, errors, migrations, roles, stored positions and the SQL by name."""
