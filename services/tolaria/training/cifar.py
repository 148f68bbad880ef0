"""CIFAR-10 from a parquet file in the Hugging Face hub's layout, decoded once and kept as a tensor beside it.

Owns the reading; the file is the user's. A set that cannot be read is an error, never other data.
"""

import hashlib
import io
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from esper.config import state_dir
from esper.errors import UnavailableError
from esper.services.tolaria.training.image_data import ImageSet, split

FILE = "cifar10-train.parquet"
MAX_SHIFT = 2
MEAN, STD = 0.5, 0.25  # near the set's own; what matters is that they never change


def load_cifar10(folder: Path, num_images: int, rng_seed: int) -> ImageSet:
    """The first ``num_images`` of the training file, split into training and validation.

    Raises:
        UnavailableError: the file is not there, cannot be read, or what reads it is not installed.
    """
    path = folder / FILE
    if not path.exists():
        raise UnavailableError(
            f"no {path}: download CIFAR-10 from the Hugging Face hub and name its folder (trainer.data_folder), "
            "or choose dataset digits"
        )
    pixels, labels = _decoded(path, num_images)
    images = (pixels.to(torch.float32) / 255.0 - MEAN) / STD
    train, val = split(len(labels), rng_seed)
    return ImageSet(images[train], labels[train], images[val], labels[val], max_shift=MAX_SHIFT, noise_std=0.0)


def _decoded(path: Path, num_images: int) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, 32, 32) as uint8 and labels (N,), from the cache where it has them."""
    status = path.stat()
    named = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{num_images}"
    cached = state_dir() / "decoded" / f"cifar10-{hashlib.sha256(named.encode()).hexdigest()[:16]}.safetensors"
    if not cached.exists():
        pixels, labels = _decode(path, num_images)
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(".unfinished")
        save_file({"pixels": pixels, "labels": labels}, unfinished)
        unfinished.replace(cached)
    found = load_file(cached)
    return found["pixels"], found["labels"]


def _decode(path: Path, num_images: int) -> tuple[Tensor, Tensor]:
    try:
        import numpy as np
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        raise UnavailableError(f"reading {path.name} needs pyarrow and Pillow: pip install 'esper[images]'") from error
    rows = parquet.read_table(path).slice(0, num_images).to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([row["label"] for row in rows])
