"""Certification: each blueprint is examined in a sandbox before a network may grow it."""
