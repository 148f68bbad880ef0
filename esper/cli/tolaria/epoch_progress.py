"""Prints the progress of training: one line an epoch."""

from esper.cli.terminal import print_line
from esper.services.tolaria.training.trainer import EpochProgress

BAR_WIDTH = 24


def print_epoch(progress: EpochProgress) -> None:
    """Print the epoch, loss, validation accuracy, size and duration."""
    done = round(BAR_WIDTH * progress.epoch / progress.num_epochs)
    bar = "[green]" + "━" * done + "[/green][dim]" + "━" * (BAR_WIDTH - done) + "[/dim]"
    print_line(
        f"{bar} epoch {progress.epoch:>2}/{progress.num_epochs}  loss {progress.loss:.3f}  "
        f"accuracy {100 * progress.val_accuracy:5.1f} %  {progress.num_parameters:,} parameters  "
        f"{progress.duration_s:.1f} s"
    )
