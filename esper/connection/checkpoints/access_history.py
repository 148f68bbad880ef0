"""What runs asked for, kept beside them: the next run of the same shape has its kernels early.

One small JSON file for each set of (kind, width) that a model's layers have, since only that
decides which kernels fit. It is a hint: one that cannot be read or written is told and left, and
of two runs that end at once the last one's is kept.
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

FOLDER = ".kernel-habits"  # beside the folders of runs

_log = get_logger(__name__)


def access_history_path(runs: Path, layers: Iterable[KasminaLayer]) -> Path:
    """The file for models whose layers have these kinds and widths."""
    shapes = sorted({f"{layer.kind}:{layer.num_features}" for layer in layers})
    return runs / FOLDER / f"{hashlib.sha256(' '.join(shapes).encode()).hexdigest()[:16]}.json"


def load_access_history(cache: KernelCache, path: Path) -> None:
    """Let the cache go on from what is there; nothing where there is none."""
    try:
        cache.learn_from(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return
    except (OSError, ValueError, ContractError) as error:
        _log.warning("access_history.load_failed", path=str(path), error=str(error))


def save_access_history(cache: KernelCache, path: Path) -> None:
    """Keep what the cache has learnt. A reader sees the old file or the new one, never half of one."""
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(cache.learnt()))
        unfinished.replace(path)
    except OSError as error:
        _log.warning("access_history.save_failed", path=str(path), error=str(error))
