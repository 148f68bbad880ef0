"""Checkpoints of a run on the local disk, their content, and the kernel access history."""
