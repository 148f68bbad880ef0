"""`esper demo`: one real training run that grows, from an empty folder to a report."""

import asyncio
import shutil
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import typer
from rich.console import Console

from esper.config import LoggingSettings, Settings, load_settings
from esper.embedded.processes import die_with_parent
from esper.embedded.stack import PUBLIC_FOLDER, EmbeddedStack, inherited_environment
from esper.errors import UnavailableError
from esper.logging import configure_logging

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "digits.yaml"
EXIT_NOTHING_GREW = 3
RUN_ID = "digits-demo"  # fixed: Tamiyo's chance follows from it


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    config: Path = typer.Option(CONFIG, help="The run's settings."),
    keep: bool = typer.Option(False, help="Keep the folder with data and logs."),
) -> None:
    """Train a small network that grows, on a stack of its own, and report. Leaves nothing running."""
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _interrupt)
    if not config.exists():
        raise UnavailableError(f"no {config}: name a run's settings with --config")
    console = Console()
    with ExitStack() as exits:
        folder = Path(tempfile.mkdtemp(prefix="esper-demo-", dir="/var/tmp"))
        folder.chmod(PUBLIC_FOLDER)
        if not keep:
            exits.callback(shutil.rmtree, folder, ignore_errors=True)
        raise typer.Exit(_run(console, config, folder, exits))


def _run(console: Console, config: Path, folder: Path, exits: ExitStack) -> int:
    from esper.cli.tolaria.demo_report import print_report
    from esper.cli.tolaria.epoch_progress import show_epoch
    from esper.oona.admin.topics import apply_topics
    from esper.services.tolaria.orchestrator import Orchestrator, standard_services
    from esper.services.tolaria.settings import TrainerSettings
    from esper.services.tolaria.training.trainer import train, train_plain
    from esper.streams.database.migrations import migrate

    configure_logging(LoggingSettings(level="ERROR", format="console"))
    console.print("[bold]Esper demo[/bold]: Kafka, Postgres and S3 of its own, on free ports of 127.0.0.1")
    stack = exits.enter_context(EmbeddedStack(folder / "stack", report=console.print))
    settings = _with_stack(load_settings(config), stack)
    asyncio.run(apply_topics(settings.need_kafka()))
    migrate(settings.need_postgres())
    (folder / "logs").mkdir()
    environment = {**inherited_environment(), **stack.environment(), "ESPER_CONFIG": str(config)}
    services = Orchestrator(standard_services(), environment, folder / "logs", report=lambda s: console.print(f"  {s}"))
    exits.enter_context(services)

    trainer = settings.section("trainer", TrainerSettings)
    linked = trainer.link.model_copy(update={"folder": folder / "runs"})
    trainer = trainer.model_copy(update={"link": linked})
    console.print(f"\n[bold]The same loop without Esper[/bold] ({trainer.epochs} epochs, seed {trainer.rng_seed})")
    plain = train_plain(trainer, lambda p: show_epoch(console, p))
    console.print("\n[bold]With Esper[/bold]: Tamiyo decides at each boundary, the trainer never waits for it")
    run_id, grown = train(trainer, settings, run_id=RUN_ID, report=lambda p: show_epoch(console, p))
    num_grown = asyncio.run(print_report(console, settings, run_id, plain, grown, services.health()))
    if not num_grown:
        console.print("[red]Nothing grew.[/red] The heuristic saw no plateau; docs/heuristic.md has its thresholds.")
        return EXIT_NOTHING_GREW
    return 0


def _with_stack(settings: Settings, stack: EmbeddedStack) -> Settings:
    own = stack.settings()
    return settings.model_copy(update={"kafka": own.kafka, "postgres": own.postgres, "s3": own.s3})


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
