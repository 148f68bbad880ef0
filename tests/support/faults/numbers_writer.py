"""Trainer of the fault suite: sends numbered events through the real link and outbox.

Usage: ``numbers_writer.py RUN FOLDER PER_SECOND``. The number of an event is its epoch. The outbox stores the next
number with it, so that after any kill it is known which numbers were recorded. On SIGTERM it records no more, sends
what is waiting and exits with 0.
"""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from esper.config import load_settings
from esper.connection.checkpoints.checkpoint_store import CheckpointStore
from esper.connection.commands import CommandInbox
from esper.connection.events.journal import Journal
from esper.connection.link_thread import LinkThread
from esper.connection.settings import OUTBOX_FILE, SPILL_FILE, LinkOptions
from esper.errors import OutboxFullError, UnavailableError
from esper.kasmina.cache import KernelCache
from esper.logging import configure_logging
from esper.oona.outbox.outbox_store import Outbox
from esper.schemas.events import EpochCompleted, LayerHealthMeasured
from esper.schemas.operational import HealthSignal

NEXT = "next_number"
SIGNAL = HealthSignal(layer_id="fc1", seed_id=0, chunk_id=0, epoch=0, health_score=0.5, activation_mean=0.1)


def main() -> None:
    run_id, folder, per_second = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_a: stopping.set())
    settings = load_settings()
    configure_logging(settings.logging)
    options = LinkOptions(folder=folder, flush_timeout_s=60)
    outbox, spill = Outbox(folder / OUTBOX_FILE), Outbox(folder / SPILL_FILE)
    outbox.open()
    spill.open()
    access_history = folder / "access_history.json"
    link = start_link(
        lambda: LinkThread(settings, run_id, outbox, spill, options, KernelCache(), access_history), stopping
    )
    store = CheckpointStore(folder)
    incarnation = store.claim_incarnation(is_resumed=(folder / "incarnations" / "1").exists())
    journal = Journal(run_id, incarnation, outbox)
    link.drain(60)  # events of earlier incarnations are sent first
    link.receive(CommandInbox(0), None)
    number = int(outbox.metadata().get(NEXT, 0))
    print(f"writing from {number}", flush=True)
    while not stopping.wait(1 / per_second):
        journal.set_metadata(NEXT, str(number + 1))
        try:
            journal.record(EpochCompleted, step=number, epoch=number, metrics={})
            number += 1
        except OutboxFullError:
            print(f"full at {number}", flush=True)
        health = journal.make(LayerHealthMeasured, step=number, epoch=number, layer_id="fc1", signals=(SIGNAL,))
        if link.telemetry.put(health):
            journal.note(health)
    is_flushed = link.stop()
    print(f"wrote {number}, flushed {is_flushed}", flush=True)
    outbox.close()
    spill.close()
    sys.exit(0 if is_flushed else 1)


def start_link(make: Callable[[], LinkThread], stopping: threading.Event) -> LinkThread:
    """Start the link, waiting for a broker: a trainer would fail instead."""
    while True:
        link = make()
        try:
            link.start()
        except UnavailableError as error:
            link.abandon()
            print(f"waiting: {error}", flush=True)
            if stopping.wait(0.3):
                sys.exit(1)
        else:
            return link


if __name__ == "__main__":
    main()
