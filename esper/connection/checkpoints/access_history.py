"""The kernel access history: which kernels runs requested, so that the next similar run can prefetch them.

One small JSON file for each set of layer kinds and widths, which determine the kernels that fit. It is a hint: a file
that cannot be read or written is logged and ignored, and of two runs that end at once the last one's is kept.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from esper.errors import ContractError
from esper.kasmina.cache import KernelCache
from esper.kasmina.layer import KasminaLayer
from esper.logging import get_logger

FOLDER = ".kernel-access-history"  # next to the folders of the runs

_log = get_logger(__name__)


def access_history_path(runs: Path, layers: Iterable[KasminaLayer]) -> Path:
    """The file for models whose layers have these kinds and widths, in the folder that has the folders of the runs."""
    shapes = sorted({f"{layer.kind}:{layer.num_features}" for layer in layers})
    return runs / FOLDER / f"{hashlib.sha256(' '.join(shapes).encode()).hexdigest()[:16]}.json"


def load_access_history(cache: KernelCache, path: Path) -> None:
    """Load the history into the cache; does nothing if there is no file."""
    try:
        cache.learn_from(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return
    except (OSError, ValueError, ContractError) as error:
        _log.warning("access_history.load_failed", path=str(path), error=str(error))


def save_access_history(cache: KernelCache, path: Path) -> None:
    """Save the cache's history. A reader sees the old file or the new one, never a partial one."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(cache.learnt()))
        partial.replace(path)
    except OSError as error:
        _log.warning("access_history.save_failed", path=str(path), error=str(error))
