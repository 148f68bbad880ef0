"""Eager while watched: compiled code runs no hook, so a sampled step must not run compiled code.

Owns the stance of torch.compile for all probes of the process; it never imports the compiler
itself, which takes seconds. Invariant: while any probe is armed the stance is "force_eager", and
when the last one lets go it is what it was before the first. Compiled code is kept meanwhile, and
is not compiled again.
"""

import sys
import threading
from contextlib import ExitStack

import torch

_lock = threading.Lock()
_holders: set[int] = set()
_restores = ExitStack()


def hold_eager(holder: object) -> None:
    """Run eagerly what is compiled, until ``holder`` lets go; nothing where nothing was ever compiled."""
    with _lock:
        if "torch._dynamo" not in sys.modules:
            return
        if not _holders:
            _restores.enter_context(torch.compiler.set_stance("force_eager"))
        _holders.add(id(holder))


def let_go(holder: object) -> None:
    """The opposite; nothing where ``holder`` does not hold."""
    with _lock:
        if id(holder) in _holders:
            _holders.remove(id(holder))
            if not _holders:
                _restores.close()
