"""Real Kafka, Postgres and S3 as child processes on 127.0.0.1, for demos, tests and first steps; see ``stack``."""
