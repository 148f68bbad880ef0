"""The training loop, with Esper and without: the same data, network and optimizer to the bit."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import esper
from esper.config import Settings
from esper.connection.connecting import connect
from esper.connection.follower import FollowerLink
from esper.connection.run import RunLink
from esper.kasmina.lifecycle import StageSchedule
from esper.kasmina.model import MorphableModel
from esper.schemas.assets import TrainingResults
from esper.services.tolaria.data import Digits, epoch_batches, load_digits
from esper.services.tolaria.network import DigitsNet
from esper.services.tolaria.settings import TrainerSettings

TARGETS = (nn.Conv2d, nn.Linear)


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
) -> tuple[str, TrainingResults]:
    """One run with Esper; gives the run's id and what it came to.

    Raises:
        UnavailableError: no broker answers when the run starts; later the run goes on without.
        ConflictError, ContractError: the run exists already, or cannot be resumed.
    """
    prepare_torch(trainer)
    data, net = load_digits(trainer.rng_seed), make_network(trainer)
    model = esper.wrap(net, target_layers=TARGETS, seeds_per_layer=trainer.seeds_per_layer)
    model.schedule = StageSchedule(**trainer.schedule.model_dump())
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
    with linked as run:
        started = time.perf_counter()
        if run.restored is not None:
            initial = float(run.restored["initial"])
        _all_epochs(run, model, optimizer, data, trainer, initial, report)
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
    return run.run_id, run.results


def train_plain(trainer: TrainerSettings, report: Report = lambda _progress: None) -> TrainingResults:
    """The same loop without Esper: what growth and overhead are measured against."""
    prepare_torch(trainer)
    data, model = load_digits(trainer.rng_seed), make_network(trainer)
    optimizer = make_optimizer(trainer, model)
    initial, started, steps = accuracy(model, data), time.perf_counter(), 0
    for epoch in range(trainer.epochs):
        began = time.perf_counter()
        loss, count = _one_epoch(model, optimizer, data, trainer, epoch, lambda: None)
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


def prepare_torch(trainer: TrainerSettings) -> None:
    """Seeds and speed settings of this process."""
    torch.manual_seed(trainer.rng_seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if trainer.threads:
        torch.set_num_threads(trainer.threads)


def make_network(trainer: TrainerSettings) -> DigitsNet:
    """The network, with the weights of the run's seed."""
    torch.manual_seed(trainer.rng_seed)
    return DigitsNet(trainer.channels, trainer.hidden)


def make_optimizer(trainer: TrainerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    if trainer.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=trainer.learning_rate)
    return torch.optim.SGD(model.parameters(), lr=trainer.learning_rate, momentum=trainer.momentum)


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the validation set that is classified right."""
    model.eval()
    right = (model(data.val_x).argmax(1) == data.val_y).float().mean()
    model.train()
    return float(right)


def _all_epochs(
    run: RunLink | FollowerLink,
    model: MorphableModel,
    optimizer: torch.optim.Optimizer,
    data: Digits,
    trainer: TrainerSettings,
    initial: float,
    report: Report,
) -> None:
    for epoch in range(run.epoch, trainer.epochs):
        began = time.perf_counter()
        loss, _count = _one_epoch(model, optimizer, data, trainer, epoch, run.step)
        progress = _progress(model, data, trainer, epoch, loss, began)
        run.epoch_completed({"val_accuracy": progress.val_accuracy, "loss": loss})
        report(progress)
        if run.epoch % trainer.checkpoint_epochs == 0 and run.epoch < trainer.epochs:
            run.checkpoint({"initial": initial})


def _one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Digits,
    trainer: TrainerSettings,
    epoch: int,
    after_step: Callable[[], None],
) -> tuple[float, int]:
    total, steps = torch.zeros(()), 0
    batches = epoch_batches(
        data, epoch=epoch, copies=trainer.copies, batch_size=trainer.batch_size, rng_seed=trainer.rng_seed
    )
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after_step()
        total, steps = total + loss.detach(), steps + 1
    return float(total) / max(1, steps), steps


def _progress(
    model: nn.Module, data: Digits, trainer: TrainerSettings, epoch: int, loss: float, began: float
) -> EpochProgress:
    return EpochProgress(
        epoch + 1,
        trainer.epochs,
        loss,
        accuracy(model, data),
        time.perf_counter() - began,
        sum(p.numel() for p in model.parameters()),
    )
