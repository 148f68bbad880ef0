"""Images to train on: scikit-learn's digits or CIFAR-10, augmented by shifts and noise.

Invariant: the same epoch of the same seed gives the same batches, in any process.
N: images, C: channels, S: side in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.errors import UnavailableError

NUM_CLASSES = 10
VALIDATION_COPIES = 4
VALIDATION_SHARE = 0.25
DRAW_STRIDE = 1_000_000_007
"""Between the seeds of two draws of a run's batches: far more than a run has epochs."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images (N, C, S, S) in 0..1 and labels (N,), split once by a run's seed.

    Attributes:
        max_shift: maximum shift of an image in each direction, in pixels; the edges are filled with 0.
        noise_std: standard deviation of the noise that is added to pixel values.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    max_shift: int
    noise_std: float

    @property
    def image_shape(self) -> tuple[int, int]:
        """The channels and the side of an image, in pixels."""
        return self.train_x.shape[1], self.train_x.shape[2]


def load_digits(rng_seed: int) -> ImageSet:
    """scikit-learn's 1,797 real images of 8x8 pixels.

    The validation set has ``VALIDATION_COPIES`` augmented copies of each of its images, which never change: so
    accuracy depends more on the network and less on the few images.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UnavailableError("the digits data set needs scikit-learn: pip install 'esper[demo]'") from error
    raw = load()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(raw.target, dtype=torch.int64)
    train, val = split(len(labels), rng_seed)
    val = val.repeat(VALIDATION_COPIES)
    augmented = _augment(images[val], 1, 0.15, torch.Generator().manual_seed(rng_seed + 1))
    return ImageSet(images[train], labels[train], augmented, labels[val], max_shift=1, noise_std=0.15)


def split(num_images: int, rng_seed: int) -> tuple[Tensor, Tensor]:
    """The indices of the training and of the validation images."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(rng_seed))
    num_val = int(num_images * VALIDATION_SHARE)
    return order[num_val:], order[:num_val]


def epoch_batches(
    data: ImageSet, *, epoch: int, copies: int, batch_size: int, rng_seed: int, draw: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: ``copies`` times the training set, newly augmented each time.

    Args:
        draw: 0 gives the run's own batches; another number gives others, as a run of another seed would have.
    """
    generator = torch.Generator().manual_seed(rng_seed * 100_003 + epoch + DRAW_STRIDE * draw)
    for _copy in range(copies):
        order = torch.randperm(len(data.train_y), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            images = _augment(data.train_x[chosen], data.max_shift, data.noise_std, generator)
            yield images, data.train_y[chosen]


def _augment(images: Tensor, max_shift: int, noise_std: float, generator: torch.Generator) -> Tensor:
    """Shift each image separately, then add noise."""
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, (max_shift,) * 4)
    shifts = torch.randint(0, 2 * max_shift + 1, (2, count, 1), generator=generator)
    rows = (shifts[0] + torch.arange(height)).view(count, 1, height, 1)
    columns = (shifts[1] + torch.arange(width)).view(count, 1, 1, width)
    shifted = padded[torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]
    if not noise_std:
        return shifted
    return shifted + noise_std * torch.randn(images.shape, generator=generator)
