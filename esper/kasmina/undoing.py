"""A foreign forward is run for what can be learnt from it, and leaves no trace."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undone(modules: Sequence[nn.Module], devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """What the forwards of ``modules`` set on them, and the random numbers they draw, is undone on leaving.

    What they write into a tensor or a list is not. ``devices``: CUDA devices whose random numbers count.
    """
    tables = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(vars(m)), {t: dict(vars(m)[t]) for t in tables}) for m in modules]
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, attributes, kept in before:
            for table, values in kept.items():
                attributes[table].clear()
                attributes[table].update(values)
            vars(module).clear()
            vars(module).update(attributes)
