"""Measures a module as it runs: FLOPs and memory of one pass, latency of many.

Runs in the sandbox only. Counts with torch's own formulas (``torch.utils.flop_counter``); it does not use
``FlopCounterMode``, which imports torch's compiler: seconds, where a pass takes milliseconds.
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
TIMED_PASSES_S = 0.015  # the least number may take longer; an examination takes 200 ms, and Urza starts with 15


class OperationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types none of it
    """Context manager that counts what the torch operations inside it cost.

    Attributes:
        flops: two per multiply-add of a matrix product or convolution.
        peak_bytes: the largest size of all tensors that were made inside and alive together, each storage once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._alive_bytes = 0

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here; the base class would import the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf.untyped_storage())
        return out

    def _track(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._alive_bytes += self._sizes[key]
            self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
            weakref.finalize(storage, self._untrack, key)

    def _untrack(self, key: int) -> None:
        self._alive_bytes -= self._sizes.pop(key)


def latencies_ms(run: Callable[[], object]) -> tuple[float, float]:
    """The median and the 95th percentile of the time of one call, in milliseconds."""
    for _n in range(NUM_WARM_UPS):
        run()
    times, began = list[float](), time.perf_counter()
    while len(times) < NUM_PASSES[0] or (len(times) < NUM_PASSES[1] and time.perf_counter() - began < TIMED_PASSES_S):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), statistics.quantiles(times, n=20, method="inclusive")[-1]
