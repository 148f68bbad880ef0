"""Sums, means and maxima over segments, with torch-scatter if it is installed and torch-geometric otherwise.

A test checks that both agree to 1e-6. On the CPU maxima always come from torch-geometric: those of torch-scatter, which
also returns their indices, take 4 to 17 times as long (``bench_tamiyo.py``).
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal

from torch import Tensor

from esper.errors import ConfigError
from esper.logging import get_logger

Reduce = Literal["sum", "mean", "max"]
Scatter = Callable[[Tensor, Tensor, int, Reduce], Tensor]
Wanted = Literal["auto", "torch-scatter", "torch-geometric"]

_log = get_logger(__name__)


@cache
def has_torch_scatter() -> bool:
    """Return whether torch-scatter is installed and can be imported; one compiled for another torch cannot."""
    if importlib.util.find_spec("torch_scatter") is None:
        return False
    try:
        import torch_scatter  # noqa: F401
    except (ImportError, OSError) as error:
        _log.warning(
            "torch_scatter.import_failed",
            error=str(error),
            hint="compile torch-scatter for this torch, or uninstall it",
        )
        return False
    return True


def find_scatter(wanted: Wanted = "auto") -> tuple[str, Scatter]:
    """Return a library's name, and ``scatter(values (N, F), segment (N,), num_segments, reduce) -> (num_segments, F)``.

    An empty segment gives 0.

    Raises:
        ConfigError: torch-scatter is required and not available.
    """
    if wanted == "torch-scatter" and not has_torch_scatter():
        raise ConfigError(
            "torch-scatter is not installed: pip install 'esper[scatter]', or set tamiyo.network.scatter to auto"
        )
    if wanted != "torch-geometric" and has_torch_scatter():
        return "torch-scatter", _by_torch_scatter
    return "torch-geometric", _by_torch_geometric


def _by_torch_scatter(values: Tensor, segment: Tensor, num_segments: int, reduce: Reduce) -> Tensor:
    import torch_scatter

    if reduce == "max" and values.device.type == "cpu":
        return _by_torch_geometric(values, segment, num_segments, reduce)
    found: Tensor = torch_scatter.scatter(values, segment, dim=0, dim_size=num_segments, reduce=reduce)
    return found


def _by_torch_geometric(values: Tensor, segment: Tensor, num_segments: int, reduce: Reduce) -> Tensor:
    found: Tensor = _geometric_scatter()(values, segment, dim=0, dim_size=num_segments, reduce=reduce)
    return found


@cache
def _geometric_scatter() -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_geometric uses torch.jit, which newer torch deprecates
        from torch_geometric.utils import scatter
    found: Callable[..., Tensor] = scatter
    return found
