"""Typed reads of the projections: status, seed causes, policy versions, pending boundaries, blob references."""
