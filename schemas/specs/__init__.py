"""The contracts for programs that are not ours: JSON Schema, AsyncAPI, and what a change of a contract breaks."""
