"""The Faust worker: from a fetched batch to committed rows, effectively once."""
