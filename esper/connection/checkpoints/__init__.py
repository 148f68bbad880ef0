"""Checkpoints on the local disk, what they contain, and the kernel access history beside them."""
