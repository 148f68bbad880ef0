"""Urza keeps blueprints and kernels: seeds the catalogue, builds kernels, answers questions."""
