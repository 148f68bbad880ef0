"""Postgres: connections, errors, migrations, roles, stored positions and named SQL queries."""
