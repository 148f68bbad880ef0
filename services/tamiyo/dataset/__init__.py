"""Experiences from the log: views, decisions and field reports joined by causation, reproducibly."""
