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


class Hold:
    """One holder's part in the stance."""


_lock = threading.Lock()
_holds: set[Hold] = set()
_restores = ExitStack()


def hold_eager() -> Hold:
    """Run eagerly what is compiled, until it is let go; no more than a token where nothing was ever compiled."""
    hold = Hold()
    with _lock:
        if "torch._dynamo" in sys.modules:
            if not _holds:
                _restores.enter_context(torch.compiler.set_stance("force_eager"))
            _holds.add(hold)
    return hold


def let_go(hold: Hold) -> None:
    """The opposite; nothing where it is let go already."""
    with _lock:
        if hold in _holds:
            _holds.remove(hold)
            if not _holds:
                _restores.close()
