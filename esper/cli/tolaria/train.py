"""`esper train`: one training run from a YAML file."""

from pathlib import Path

import typer

from esper.cli.terminal import print_line
from esper.config import load_settings
from esper.logging import configure_logging


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    config: Path = typer.Argument(..., help="YAML file with a `trainer` section, e.g. configs/digits.yaml."),
    run_id: str | None = typer.Option(None, "--run-id", help="Id of the run; needed to resume it later."),
    resume: bool = typer.Option(False, "--resume", help="Resume the run --run-id from its newest checkpoint."),
) -> None:
    """Train a network that grows as Tamiyo decides. Needs a running stack (`esper up`)."""
    from esper.cli.tolaria.epoch_progress import print_epoch
    from esper.services.tolaria.settings import TrainerSettings
    from esper.services.tolaria.training.trainer import train as run_training

    if resume and run_id is None:
        raise typer.BadParameter("--resume needs --run-id, the run to resume")
    settings = load_settings(config)
    configure_logging(settings.logging)
    trainer = settings.section("trainer", TrainerSettings)
    if trainer.link.metrics_port is None:
        trainer = trainer.model_copy(update={"link": trainer.link.model_copy(update={"metrics_port": 0})})
    name, results = run_training(trainer, settings, run_id=run_id, is_resumed=resume, report=print_epoch)
    typer.echo(results.model_dump_json(indent=2))
    print_line(f"run {name}: `esper why {name} LAYER:SEED` explains what happened to a seed")
