"""CIFAR-10 from a parquet file in the Hugging Face hub's layout, decoded once and cached as tensors.

Owns reading and decoding; the user provides the file. Invariant: a data set that cannot be read is an error, never
replaced by other data.
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

CIFAR10_FILE = "cifar10-train.parquet"
MISSING_PACKAGES = f"reading {CIFAR10_FILE} needs pyarrow and Pillow: pip install 'esper[images]'"
MAX_SHIFT = 2
MEAN, STD = 0.5, 0.25  # close to the data set's own; results are comparable only while they never change


def load_cifar10(folder: Path, num_images: int, rng_seed: int) -> ImageSet:
    """The first ``num_images`` of the training file, split into training and validation.

    Raises:
        UnavailableError: the file is missing, or the packages that read it are.
    """
    path = folder / CIFAR10_FILE
    if not path.exists():
        raise UnavailableError(
            f"{path} is missing; download CIFAR-10 from the Hugging Face hub and set trainer.data_folder, "
            "or set trainer.dataset to digits"
        )
    pixels, labels = _load_decoded(path, num_images)
    images = (pixels.to(torch.float32) / 255.0 - MEAN) / STD
    train, val = split(len(labels), rng_seed)
    return ImageSet(images[train], labels[train], images[val], labels[val], max_shift=MAX_SHIFT, noise_std=0.0)


def _load_decoded(path: Path, num_images: int) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, 32, 32) as uint8 and labels (N,), from the cache if it has them."""
    status = path.stat()
    identity = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{num_images}"
    cached = state_dir() / "decoded" / f"cifar10-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if not cached.exists():
        pixels, labels = _decode(path, num_images)
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(".unfinished")
        save_file({"pixels": pixels, "labels": labels}, unfinished)
        unfinished.replace(cached)
    tensors = load_file(cached)
    return tensors["pixels"], tensors["labels"]


def _decode(path: Path, num_images: int) -> tuple[Tensor, Tensor]:
    try:
        import numpy as np
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        raise UnavailableError(MISSING_PACKAGES) from error
    rows = parquet.read_table(path).slice(0, num_images).to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([row["label"] for row in rows])
