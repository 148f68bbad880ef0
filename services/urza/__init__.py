"""Urza, the library of blueprints and kernels: certifies blueprints, builds kernels, serves both over HTTP."""
