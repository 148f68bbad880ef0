"""The training corpus: many small runs for Tamiyo to learn from."""
