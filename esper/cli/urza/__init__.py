"""Commands about Urza's library of blueprints and kernels."""
