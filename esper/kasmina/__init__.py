"""Kasmina: seeds inside a model's layers. Torch and numpy; no network, no settings."""
