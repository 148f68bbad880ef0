"""Queries over the projections: lag, causes, policy versions, pending boundaries, blob references."""
