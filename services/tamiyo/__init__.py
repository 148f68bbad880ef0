"""Tamiyo decides: one choice for one boundary of one run, read from the projections, written to the log."""
