"""The Faust worker: projects fetched batches into Postgres, effectively once."""
