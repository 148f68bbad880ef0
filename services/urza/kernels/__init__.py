"""Kernels: built from shipped and certified blueprints, and uploaded to S3."""
