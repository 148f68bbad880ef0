"""The training loop, with Esper and without: the same data, network and optimizer to the bit."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.config import Settings
from esper.connection.boundary_work import CommandObserver
from esper.connection.checkpoints.training_state import Training
from esper.connection.connector import connect
from esper.connection.follower_link import FollowerLink
from esper.connection.run_link import RunLink
from esper.kasmina.model import MorphableModel
from esper.schemas.assets import TrainingResults
from esper.services.tolaria.counterfactuals.forks import METRIC, Forks
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.image_data import ImageSet
from esper.services.tolaria.training.training_loop import (
    accuracy,
    load_images,
    make_model,
    make_network,
    make_optimizer,
    one_epoch,
    prepare_torch,
)


@dataclass(frozen=True, slots=True)
class EpochProgress:
    """Told after each epoch. Accuracy is a share in 0..1 of the validation set."""

    epoch: int
    num_epochs: int
    loss: float
    val_accuracy: float
    duration_s: float
    num_parameters: int


Report = Callable[[EpochProgress], None]


def train(
    trainer: TrainerSettings,
    settings: Settings,
    *,
    run_id: str | None = None,
    is_resumed: bool = False,
    report: Report = lambda _progress: None,
    observer: CommandObserver | None = None,
) -> tuple[str, TrainingResults]:
    """One run with Esper; gives the run's id and what it came to.

    Args:
        observer: sees what commands do to the run; of several ranks that of the first alone.

    Raises:
        UnavailableError: no broker answers when the run starts; later the run goes on without.
        ConflictError, ContractError: the run exists already, or cannot be resumed.
    """
    prepare_torch(trainer)
    data = load_images(trainer)
    model = make_model(trainer, data.image_shape)
    optimizer = make_optimizer(trainer, model)
    initial = accuracy(model, data)
    linked = connect(
        model,
        optimizer,
        run_id=run_id,
        settings=settings,
        options=trainer.link,
        hyperparameters={k: v for k, v in trainer.model_dump().items() if isinstance(v, (int, float, str))},
        is_resumed=is_resumed,
    )
    with linked as run, _forks_of(trainer, run, Training(model, optimizer)) as forks:
        if observer is not None and isinstance(run, RunLink):
            run.observe(observer)
        started = time.perf_counter()
        if run.restored is not None:
            initial = float(run.restored["initial"])
            if forks is not None and "forks" in run.restored:
                forks.load_dict(run.restored["forks"])
        _all_epochs(_Course(run, forks, trainer), model, optimizer, data, initial, report)
        duration = time.perf_counter() - started
        run.results = TrainingResults(
            initial_accuracy=initial,
            final_accuracy=accuracy(model, data),
            adaptations_applied=run.num_adaptations,
            overhead_percent=100.0 * run.overhead_s / max(1e-9, duration - run.overhead_s),
            epochs=run.epoch,
            steps=run.step_number,
            duration_s=duration,
        )
        if forks is not None:
            forks.finish()
    return run.run_id, run.results


def train_baseline(trainer: TrainerSettings, report: Report = lambda _progress: None, *, draw: int = 0) -> TrainingResults:
    """The same loop without Esper: what growth and overhead are measured against.

    Args:
        draw: other batches for the same network (``epoch_batches``).
    """
    prepare_torch(trainer)
    data = load_images(trainer)
    model = make_network(trainer, data.image_shape)
    optimizer = make_optimizer(trainer, model)
    initial, started, steps = accuracy(model, data), time.perf_counter(), 0
    for epoch in range(trainer.epochs):
        began = time.perf_counter()
        loss, count = one_epoch(model, optimizer, data, trainer, epoch, lambda: None, draw=draw)
        steps += count
        report(_progress(model, data, trainer, epoch, loss, began))
    return TrainingResults(
        initial_accuracy=initial,
        final_accuracy=accuracy(model, data),
        adaptations_applied=0,
        overhead_percent=0.0,
        epochs=trainer.epochs,
        steps=steps,
        duration_s=time.perf_counter() - started,
    )


class _Course:
    """A run on its way: what follows each step and each epoch."""

    def __init__(self, run: RunLink | FollowerLink, forks: Forks | None, trainer: TrainerSettings) -> None:
        self.run, self.forks, self.trainer = run, forks, trainer
        self._boundary_at = time.monotonic()

    def step(self) -> None:
        """Call it after each optimizer step."""
        self.run.step()
        if self.trainer.min_boundary_interval_s and self.run.step_number % self.trainer.link.boundary_steps == 0:
            time.sleep(max(0.0, self._boundary_at + self.trainer.min_boundary_interval_s - time.monotonic()))
            self._boundary_at = time.monotonic()

    def epoch_completed(self, val_accuracy: float, loss: float) -> None:
        """Call it at the end of each epoch."""
        self.run.epoch_completed({METRIC: val_accuracy, "loss": loss})
        if self.forks is not None:
            self.forks.epoch_completed(val_accuracy)

    def checkpoint(self, initial: float) -> None:
        """Save what a resumed run needs, forks that are not told among it."""
        extra: dict[str, Any] = {"initial": initial}
        if self.forks is not None:
            extra["forks"] = self.forks.to_dict()
        self.run.checkpoint(extra)


@contextmanager
def _forks_of(trainer: TrainerSettings, run: RunLink | FollowerLink, training: Training) -> Iterator[Forks | None]:
    """The forks of a run that the settings want some of; one rank of several has none."""
    if not (trainer.fork.germination_share or trainer.fork.verdict_share) or not isinstance(run, RunLink):
        yield None
        return
    with Forks(trainer, run, training) as forks:
        yield forks


def _all_epochs(
    course: _Course,
    model: MorphableModel,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    initial: float,
    report: Report,
) -> None:
    trainer, run = course.trainer, course.run
    for epoch in range(run.epoch, trainer.epochs):
        began = time.perf_counter()
        loss, _count = one_epoch(model, optimizer, data, trainer, epoch, course.step)
        progress = _progress(model, data, trainer, epoch, loss, began)
        course.epoch_completed(progress.val_accuracy, loss)
        report(progress)
        if run.epoch % trainer.checkpoint_epochs == 0 and run.epoch < trainer.epochs:
            course.checkpoint(initial)


def _progress(
    model: nn.Module, data: ImageSet, trainer: TrainerSettings, epoch: int, loss: float, began: float
) -> EpochProgress:
    return EpochProgress(
        epoch + 1,
        trainer.epochs,
        loss,
        accuracy(model, data),
        time.perf_counter() - began,
        sum(p.numel() for p in model.parameters()),
    )
