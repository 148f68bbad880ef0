"""Tolaria trains, and starts the other services."""
