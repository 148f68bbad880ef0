"""`esper demo`: trains a small network without and with growth on a temporary stack, and prints a report."""

import asyncio
import shutil
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import typer

from esper.cli.terminal import print_line
from esper.config import LoggingSettings, Settings, load_settings
from esper.embedded.processes import die_with_parent
from esper.embedded.stack import FOLDER_MODE, EmbeddedStack, inherited_environment
from esper.errors import ConfigError
from esper.logging import configure_logging

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "digits.yaml"
EXIT_NOTHING_GREW = 3
RUN_ID = "digits-demo"  # fixed, since Tamiyo derives its random numbers from the run id


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    config: Path = typer.Option(
        CONFIG, help="YAML file with the settings of the run.", show_default="configs/digits.yaml"
    ),
    keep: bool = typer.Option(False, "--keep", help="Keep the folder with data and logs."),
) -> None:
    """Train a small network with and without growth on a temporary stack, and report. Takes two to four minutes."""
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _interrupt)
    if not config.exists():
        raise ConfigError(f"{config} does not exist; name a settings file with --config")
    with ExitStack() as exits:
        folder = Path(tempfile.mkdtemp(prefix="esper-demo-", dir="/var/tmp"))
        folder.chmod(FOLDER_MODE)
        if not keep:
            exits.callback(shutil.rmtree, folder, ignore_errors=True)
        raise typer.Exit(_run(config, folder, exits))


def _run(config: Path, folder: Path, exits: ExitStack) -> int:
    from esper.cli.tolaria.demo_report import print_report
    from esper.cli.tolaria.epoch_progress import print_epoch
    from esper.oona.admin.topics import apply_topics
    from esper.services.tolaria.orchestrator import Orchestrator, standard_services
    from esper.services.tolaria.settings import TrainerSettings
    from esper.services.tolaria.training.trainer import train, train_baseline
    from esper.streams.database.migrations import migrate

    configure_logging(LoggingSettings(level="ERROR", format="console"))
    print_line(
        "[bold]Esper demo[/bold]: a small network learns to recognize digits, first as it is, then growing.\n"
        "Starting Kafka, Postgres and S3 on free ports of 127.0.0.1; everything is removed at the end."
    )
    stack = exits.enter_context(EmbeddedStack(folder / "stack", report=print_line))
    settings = _with_stack(load_settings(config), stack)
    asyncio.run(apply_topics(settings.need_kafka()))
    migrate(settings.need_postgres())
    (folder / "logs").mkdir()
    environment = {**inherited_environment(), **stack.environment(), "ESPER_CONFIG": str(config)}
    services = Orchestrator(standard_services(), environment, folder / "logs", report=lambda s: print_line(f"  {s}"))
    exits.enter_context(services)

    trainer = settings.section("trainer", TrainerSettings)
    linked = trainer.link.model_copy(update={"folder": folder / "runs"})
    trainer = trainer.model_copy(update={"link": linked})
    print_line(
        f"\n[bold]Without Esper[/bold]: the network stays as it is ({trainer.epochs} epochs, seed {trainer.rng_seed})"
    )
    baseline = train_baseline(trainer, print_epoch)
    print_line("\n[bold]With Esper[/bold]: Tamiyo, the controller, decides where and when the network grows")
    run_id, grown = train(trainer, settings, run_id=RUN_ID, report=print_epoch)
    num_grown = asyncio.run(print_report(settings, run_id, baseline, grown, services.health()))
    if not num_grown:
        print_line("[red]Nothing grew.[/red] Tamiyo saw no plateau; docs/design/policies.md lists its thresholds.")
        return EXIT_NOTHING_GREW
    return 0


def _with_stack(settings: Settings, stack: EmbeddedStack) -> Settings:
    addresses = stack.settings()
    update = {"kafka": addresses.kafka, "postgres": addresses.postgres, "s3": addresses.s3}
    return settings.model_copy(update=update)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
