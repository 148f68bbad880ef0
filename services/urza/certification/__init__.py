"""Certification: a blueprint is examined in a sandbox before any network may grow it."""
