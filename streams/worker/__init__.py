"""The Faust worker: from fetched batches to committed rows, effectively once."""
