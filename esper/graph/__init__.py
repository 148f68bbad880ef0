"""The pure folds: health windows, and ``assemble(rows)``, which makes the view that Tamiyo sees.

No torch, no I/O, no clock: the same rows give the same bytes in a worker, in Tamiyo and in a replay.
"""
