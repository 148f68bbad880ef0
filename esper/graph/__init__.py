"""Pure functions of rows: health windows, and ``assemble(rows)``, which builds the graph view that Tamiyo decides on.

Uses no torch, no I/O and no clock. Invariant: the same rows give the same bytes in a worker, in Tamiyo and in a replay.
"""
