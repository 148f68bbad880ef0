"""`esper outbox list | send`: events that trainers stored on disk while Kafka was away."""

import asyncio
from pathlib import Path

import typer

from esper.cli.command_group import add_group
from esper.config import load_settings
from esper.connection.settings import OUTBOX_FILE, SPILL_FILE
from esper.errors import ConfigError
from esper.oona.outbox.outbox_sender import send_oldest
from esper.oona.outbox.outbox_store import Outbox, num_waiting_in
from esper.oona.producer import OonaProducer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    about = "List and send events that trainers could not deliver."
    add_group(app, "outbox", about, {"list": list_waiting, "send": send})


def list_waiting(
    folder: Path = typer.Argument(Path("runs"), help="Folder of one run, or of all runs."),
) -> None:
    """List the number of waiting events of each run."""
    for path in _outbox_files(folder):
        typer.echo(f"{num_waiting_in(path):>8,} {path}")


def send(
    folder: Path = typer.Argument(..., help="Folder of a run that no process is training."),
) -> None:
    """Send the waiting events in their order. Consumers ignore an event that they have already received."""
    for path in _outbox_files(folder):
        typer.echo(f"{asyncio.run(_send(path)):>8,} sent from {path}")


def _outbox_files(folder: Path) -> list[Path]:
    found = sorted(p for name in (OUTBOX_FILE, SPILL_FILE) for p in (*folder.glob(name), *folder.glob(f"*/{name}")))
    if not found:
        raise ConfigError(f"{folder}: no {OUTBOX_FILE} in it; name the folder of a run (setting trainer.link.folder)")
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
