"""scikit-learn's digits: 1,797 real images of 8x8, bundled with the package; shifted and noised.

The same epoch of the same seed gives the same batches, in any process.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.errors import UnavailableError

NUM_CLASSES = 10
VALIDATION_SHARE = 0.25
MAX_SHIFT = 1  # pixels
NOISE_STD = 0.15  # of pixel values that are scaled to 0..1


@dataclass(frozen=True, slots=True)
class Digits:
    """Images (N, 1, 8, 8) in 0..1 and labels (N,), split once by ``rng_seed``."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor


def load_digits(rng_seed: int) -> Digits:
    """Read and split the data set.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UnavailableError("the digits come with scikit-learn: pip install 'esper[demo]'") from error
    raw = load()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(rng_seed))
    num_val = int(len(labels) * VALIDATION_SHARE)
    val, train = order[:num_val], order[num_val:]
    noisy = _noised(images[val], torch.Generator().manual_seed(rng_seed + 1))
    return Digits(images[train], labels[train], noisy, labels[val])


def epoch_batches(
    data: Digits, *, epoch: int, copies: int, batch_size: int, rng_seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: ``copies`` times the training set, each shifted and noised anew."""
    generator = torch.Generator().manual_seed(rng_seed * 100_003 + epoch)
    for _copy in range(copies):
        order = torch.randperm(len(data.train_y), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield _noised(data.train_x[chosen], generator), data.train_y[chosen]


def _noised(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted on its own by up to MAX_SHIFT pixels (edges filled with 0), then noised."""
    count, _channels, height, width = images.shape
    padded = nn.functional.pad(images, (MAX_SHIFT,) * 4)
    shifts = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1), generator=generator)
    rows = (shifts[0] + torch.arange(height)).unsqueeze(2)
    columns = (shifts[1] + torch.arange(width)).unsqueeze(1)
    shifted = padded[torch.arange(count).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)
    return shifted + NOISE_STD * torch.randn(images.shape, generator=generator)
