"""Training runs with Esper and without: the same data, network and optimizer, to the bit."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.config import Settings
from esper.connection.boundary_processor import CommandObserver
from esper.connection.checkpoints.training_state import TrainingState
from esper.connection.connector import connect
from esper.connection.run_handle import RunHandle
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
    prepare_torch,
    train_epoch,
)


@dataclass(frozen=True, slots=True)
class EpochProgress:
    """The progress after an epoch. Accuracy is a fraction of the validation set, in 0..1."""

    epoch: int
    num_epochs: int
    loss: float
    val_accuracy: float
    duration_s: float
    num_parameters: int


ProgressCallback = Callable[[EpochProgress], None]


def train(
    trainer: TrainerSettings,
    settings: Settings,
    *,
    run_id: str | None = None,
    is_resumed: bool = False,
    report: ProgressCallback = lambda _progress: None,
    observer: CommandObserver | None = None,
) -> tuple[str, TrainingResults]:
    """Train one run with Esper. Returns the run's id and its results.

    Args:
        observer: observes the commands that change the run; of several ranks, only that of the first is called.

    Raises:
        UnavailableError: no broker answers when the run starts; a run that has started continues without one.
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
    with linked as run, _forks_of(trainer, run, TrainingState(model, optimizer)) as forks:
        if observer is not None and isinstance(run, RunLink):
            run.observe(observer)
        started = time.perf_counter()
        if run.restored is not None:
            initial = float(run.restored["initial"])
            if forks is not None and "forks" in run.restored:
                forks.load_dict(run.restored["forks"])
        _train_epochs(_RunHooks(run, forks, trainer), model, optimizer, data, initial, report)
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


def train_baseline(
    trainer: TrainerSettings, report: ProgressCallback = lambda _progress: None, *, draw: int = 0
) -> TrainingResults:
    """Train the same network without Esper: the baseline of growth and overhead.

    Args:
        draw: selects other batches for the same network (``epoch_batches``).
    """
    prepare_torch(trainer)
    data = load_images(trainer)
    model = make_network(trainer, data.image_shape)
    optimizer = make_optimizer(trainer, model)
    initial, started, steps = accuracy(model, data), time.perf_counter(), 0
    for epoch in range(trainer.epochs):
        epoch_started = time.perf_counter()
        loss, count = train_epoch(model, optimizer, data, trainer, epoch, lambda: None, draw=draw)
        steps += count
        report(_progress(model, data, trainer, epoch, loss, epoch_started))
    return TrainingResults(
        initial_accuracy=initial,
        final_accuracy=accuracy(model, data),
        adaptations_applied=0,
        overhead_percent=0.0,
        epochs=trainer.epochs,
        steps=steps,
        duration_s=time.perf_counter() - started,
    )


class _RunHooks:
    """What a run does after each step and each epoch."""

    def __init__(self, run: RunHandle, forks: Forks | None, trainer: TrainerSettings) -> None:
        self.run, self.forks, self.trainer = run, forks, trainer
        self._passed_boundary_at = time.monotonic()

    def step(self) -> None:
        """Called after each optimizer step."""
        self.run.step()
        if self.trainer.min_boundary_interval_s and self.run.step_number % self.trainer.link.boundary_steps == 0:
            time.sleep(max(0.0, self._passed_boundary_at + self.trainer.min_boundary_interval_s - time.monotonic()))
            self._passed_boundary_at = time.monotonic()

    def epoch_completed(self, val_accuracy: float, loss: float) -> None:
        """Called at the end of each epoch."""
        self.run.epoch_completed({METRIC: val_accuracy, "loss": loss})
        if self.forks is not None:
            self.forks.epoch_completed(val_accuracy)

    def checkpoint(self, initial: float) -> None:
        """Save what a resumed run needs, unreported forks included."""
        extra: dict[str, Any] = {"initial": initial}
        if self.forks is not None:
            extra["forks"] = self.forks.to_dict()
        self.run.checkpoint(extra)


@contextmanager
def _forks_of(trainer: TrainerSettings, run: RunHandle, training: TrainingState) -> Iterator[Forks | None]:
    """The forks of a run, where the settings ask for some; a rank of several has none."""
    if not (trainer.fork.germination_share or trainer.fork.verdict_share) or not isinstance(run, RunLink):
        yield None
        return
    with Forks(trainer, run, training) as forks:
        yield forks


def _train_epochs(
    hooks: _RunHooks,
    model: MorphableModel,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    initial: float,
    report: ProgressCallback,
) -> None:
    trainer, run = hooks.trainer, hooks.run
    for epoch in range(run.epoch, trainer.epochs):
        epoch_started = time.perf_counter()
        loss, _count = train_epoch(model, optimizer, data, trainer, epoch, hooks.step)
        progress = _progress(model, data, trainer, epoch, loss, epoch_started)
        hooks.epoch_completed(progress.val_accuracy, loss)
        report(progress)
        if run.epoch % trainer.checkpoint_epochs == 0 and run.epoch < trainer.epochs:
            hooks.checkpoint(initial)


def _progress(
    model: nn.Module, data: ImageSet, trainer: TrainerSettings, epoch: int, loss: float, started: float
) -> EpochProgress:
    return EpochProgress(
        epoch + 1,
        trainer.epochs,
        loss,
        accuracy(model, data),
        time.perf_counter() - started,
        sum(p.numel() for p in model.parameters()),
    )
