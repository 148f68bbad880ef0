"""`esper outbox`: what a trainer left on disk because Kafka was away."""

import asyncio
from pathlib import Path

import typer

from esper.config import load_settings
from esper.connection.settings import OUTBOX_FILE, SPILL_FILE
from esper.errors import ConfigError
from esper.oona.outbox.outbox_sender import send_oldest
from esper.oona.outbox.outbox_store import Outbox, waiting_in
from esper.oona.producer import OonaProducer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    outbox = typer.Typer(no_args_is_help=True, help="What trainers left on disk because Kafka was away.")
    outbox.command("list")(list_waiting)
    outbox.command()(send)
    app.add_typer(outbox, name="outbox")


def list_waiting(
    folder: Path = typer.Argument(Path("runs"), help="A run's folder, or the folder of all runs."),
) -> None:
    """Show how much waits, run by run. Changes nothing."""
    for path in _files(folder):
        typer.echo(f"{waiting_in(path):>8,} {path}")


def send(
    folder: Path = typer.Argument(..., help="The run's folder. No process may be training that run."),
) -> None:
    """Send what waits, in its order; a resend of what Kafka has already does no harm."""
    for path in _files(folder):
        typer.echo(f"{asyncio.run(_send(path)):>8,} sent from {path}")


def _files(folder: Path) -> list[Path]:
    found = sorted(p for name in (OUTBOX_FILE, SPILL_FILE) for p in (*folder.glob(name), *folder.glob(f"*/{name}")))
    if not found:
        raise ConfigError(f"{folder} holds no {OUTBOX_FILE}: name a run's folder (the setting trainer.link.folder)")
    return found


async def _send(path: Path) -> int:
    outbox, count = Outbox(path), 0
    async with OonaProducer(load_settings().need_kafka(), client_id="esper-outbox") as producer:
        outbox.open()
        try:
            while sent := await send_oldest(outbox, producer):
                count += sent
        finally:
            outbox.close()
    return count
