"""Forks of a run: branches from one snapshot that differ in one decision, and the effect of that decision."""
