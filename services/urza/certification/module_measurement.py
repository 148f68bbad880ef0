"""Measures a module as it runs: FLOPs and memory of one pass, latency of many.

Runs in the sandbox alone. Counts by torch's own formulas (``torch.utils.flop_counter``); its ``FlopCounterMode``
is not used, since that imports torch's compiler, which costs seconds where a pass takes milliseconds.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NUM_WARM_UPS = 2
NUM_PASSES = (5, 20)  # at least and at most
PASSES_S = 0.015  # the least number may take longer; an examination takes some 200 ms, and Urza starts with 15


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types none of it
    """Context manager: what the operations inside it cost.

    Attributes:
        flops: two for each multiply-add of a matrix product or convolution.
        peak_bytes: the most that tensors made inside took together, each storage once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}
        self._now_bytes = 0

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and to say so would import the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._now_bytes += self._alive[key]
            self.peak_bytes = max(self.peak_bytes, self._now_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now_bytes -= self._alive.pop(key)


def latencies_ms(run: Callable[[], object]) -> tuple[float, float]:
    """The median and the 95th percentile of one call, in milliseconds."""
    for _n in range(NUM_WARM_UPS):
        run()
    taken, began = list[float](), time.perf_counter()
    while len(taken) < NUM_PASSES[0] or (len(taken) < NUM_PASSES[1] and time.perf_counter() - began < PASSES_S):
        start = time.perf_counter()
        run()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken), statistics.quantiles(taken, n=20, method="inclusive")[-1]
