"""Tolaria, the trainer: trains models and starts the other services."""
