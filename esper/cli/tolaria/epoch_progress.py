"""How training shows itself on a terminal: a line an epoch."""

from rich.console import Console

from esper.services.tolaria.training.trainer import EpochProgress

BAR_WIDTH = 24


def show_epoch(console: Console, progress: EpochProgress, label: str = "") -> None:
    """One line: where it is, how well it does, how big it is."""
    done = round(BAR_WIDTH * progress.epoch / progress.num_epochs)
    bar = "[green]" + "━" * done + "[/green][dim]" + "━" * (BAR_WIDTH - done) + "[/dim]"
    console.print(
        f"{label}{bar} epoch {progress.epoch:>2}/{progress.num_epochs}  loss {progress.loss:.3f}  "
        f"accuracy {100 * progress.val_accuracy:5.1f} %  {progress.num_parameters:,} parameters  "
        f"{progress.duration_s:.1f} s",
        highlight=False,
    )
