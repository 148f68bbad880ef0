"""`esper train`: one training run from a YAML file."""

from pathlib import Path

import typer
from rich.console import Console

from esper.config import load_settings
from esper.logging import configure_logging


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    config: Path = typer.Argument(..., help="A YAML file with a `trainer` section."),
    run_id: str | None = typer.Option(None, "--run-id", help="Names the run; needed to resume it."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest checkpoint of --run-id."),
) -> None:
    """Train a network that grows by Tamiyo's decisions."""
    from esper.cli.tolaria.epoch_progress import show_epoch
    from esper.services.tolaria.settings import TrainerSettings
    from esper.services.tolaria.training.trainer import train as run_training

    if resume and run_id is None:
        raise typer.BadParameter("--resume needs --run-id: which run?")
    settings = load_settings(config)
    configure_logging(settings.logging)
    trainer = settings.section("trainer", TrainerSettings)
    if trainer.link.metrics_port is None:
        trainer = trainer.model_copy(update={"link": trainer.link.model_copy(update={"metrics_port": 0})})
    console = Console(stderr=False)
    name, results = run_training(
        trainer, settings, run_id=run_id, is_resumed=resume, report=lambda p: show_epoch(console, p)
    )
    console.print_json(results.model_dump_json())
    console.print(f"run {name}: `esper why {name} LAYER:SEED` says why a seed lived")
