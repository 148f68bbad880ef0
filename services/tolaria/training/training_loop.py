"""The training loop: data, host, optimizer and one epoch, the same for a run and for its forks.

Owns the definition of a step. Invariant: the same settings give the same numbers, to the bit, in any process with the
same number of threads.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

import esper
from esper.kasmina.lifecycle import StageSchedule
from esper.kasmina.model import MorphableModel
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.cifar import load_cifar10
from esper.services.tolaria.training.hosts import Cnn, DigitsNet, Mlp
from esper.services.tolaria.training.image_data import ImageSet, epoch_batches, load_digits

TARGETS = (nn.Conv2d, nn.Linear)


def prepare_torch(trainer: TrainerSettings) -> None:
    """Set the random seed, the threads and the precision of this process."""
    torch.manual_seed(trainer.rng_seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if trainer.threads:
        torch.set_num_threads(trainer.threads)


def load_images(trainer: TrainerSettings) -> ImageSet:
    """The data set of the settings; the last one stays in memory.

    Raises:
        UnavailableError: the data set, or a package that reads it, is missing.
    """
    return _load(trainer.dataset, trainer.data_folder, trainer.num_images, trainer.rng_seed)


def make_network(trainer: TrainerSettings, image_shape: tuple[int, int]) -> nn.Module:
    """The host, with initial weights from ``trainer.rng_seed``.

    Args:
        image_shape: the channels and the side of an image, in pixels.
    """
    torch.manual_seed(trainer.rng_seed)
    channels, side = image_shape
    match trainer.network:
        case "mlp":
            return Mlp(channels * side * side, trainer.hidden, trainer.depth)
        case "cnn":
            return Cnn(channels, side, trainer.channels, trainer.depth)
        case _:
            return DigitsNet(trainer.channels, trainer.hidden)


def make_model(trainer: TrainerSettings, image_shape: tuple[int, int]) -> MorphableModel:
    """The host with its seeds, all of them dormant."""
    net = make_network(trainer, image_shape)
    model = esper.wrap(net, target_layers=TARGETS, seeds_per_layer=trainer.seeds_per_layer)
    model.schedule = StageSchedule(**trainer.schedule.model_dump())
    model.boundary_steps = trainer.link.boundary_steps
    return model


def make_optimizer(trainer: TrainerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the settings."""
    if trainer.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=trainer.learning_rate)
    return torch.optim.SGD(model.parameters(), lr=trainer.learning_rate, momentum=trainer.momentum)


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    """The fraction of the validation set that is classified correctly, in 0..1."""
    model.eval()
    correct = (model(data.val_x).argmax(1) == data.val_y).float().mean()
    model.train()
    return float(correct)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    trainer: TrainerSettings,
    epoch: int,
    after_step: Callable[[], None],
    *,
    first_batch: int = 0,
    draw: int = 0,
) -> tuple[float, int]:
    """Train on the batches of one epoch. Returns the mean loss and the number of steps.

    Args:
        after_step: called after each optimizer step.
        first_batch: the index of the first batch to train on.
        draw: see ``epoch_batches``.
    """
    total, steps = torch.zeros(()), 0
    batches = epoch_batches(
        data, epoch=epoch, copies=trainer.copies, batch_size=trainer.batch_size, rng_seed=trainer.rng_seed, draw=draw
    )
    for x, y in itertools.islice(batches, first_batch, None):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after_step()
        total, steps = total + loss.detach(), steps + 1
    return float(total) / max(1, steps), steps


@lru_cache(maxsize=1)
def _load(dataset: str, folder: Path, num_images: int, rng_seed: int) -> ImageSet:
    return load_digits(rng_seed) if dataset == "digits" else load_cifar10(folder, num_images, rng_seed)
