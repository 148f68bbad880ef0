"""The training corpus: plans and trains many small runs for Tamiyo to learn from."""
