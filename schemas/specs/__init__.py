"""The contracts for other programs: JSON Schemas, the AsyncAPI document, and the check for breaking changes."""
