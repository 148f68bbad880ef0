"""Fills the disk of Postgres while workers run: a script for tests/support/processes/small_disk.py.

Usage: ``full_disk_storm.py FOLDER ROUNDS SEED``. ``FOLDER/postgres`` is on the small disk, the rest is not.
"""

import asyncio
import logging
import random
import sys
from contextlib import suppress
from pathlib import Path

import psycopg
from support.conditions import wait_until
from support.faults.streams_storm import StreamsStorm, streams_storm

from esper.embedded.stack import EmbeddedStack
from esper.oona.admin.topics import apply_topics
from esper.streams.database.migrations import migrate

STALLED = "worker.stalled"


def fill_disk(filler: Path) -> None:
    """Fill the remaining space."""
    with filler.open("ab", buffering=0) as file:
        for size in (2**20, 2**13):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def disk_full(stage: StreamsStorm, filler: Path, *, for_wal: bool) -> str:
    """Fill the disk until a worker reports a stall, then free it. Returns whether Postgres survived, in words.

    Args:
        for_wal: fill the space of the write-ahead log too, which makes Postgres exit.
    """
    postgres = stage.stack.postgres
    before = set(stage.log_lines(STALLED))
    fill_disk(filler)
    if for_wal:
        with suppress(psycopg.OperationalError), psycopg.connect(postgres.dsn, autocommit=True) as connection:
            for _ in range(20):
                connection.execute("SELECT pg_logical_emit_message(true, 'storm', 'x'), pg_switch_wal()")
    wait_until(lambda: set(stage.log_lines(STALLED)) - before, 120, "a report of the stall")
    assert for_wal or any("No space left" in line for line in set(stage.log_lines(STALLED)) - before), stage.logs()
    filler.unlink()
    if ended := not postgres.is_alive:
        postgres.start()
    wait_until(lambda: _is_accepting(postgres.dsn) or not postgres.is_alive, 60, "Postgres with free space")
    return "exited and was restarted" if ended else "survived"


def _is_accepting(dsn: str) -> bool:
    with suppress(psycopg.OperationalError), psycopg.connect(dsn) as connection:
        return connection.execute("SELECT 1").fetchone() is not None
    return False


def main(folder: Path, num_rounds: int, seed: int) -> None:
    """Run the rounds."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs each record that waits for a new leader
    with EmbeddedStack(folder) as stack:
        settings = stack.settings()
        asyncio.run(apply_topics(settings.need_kafka()))
        migrate(settings.need_postgres())
        with streams_storm(stack, folder, random.Random(seed)) as stage:
            stage.begin()
            for number in range(1, num_rounds + 1):
                outcome = disk_full(stage, folder / "postgres" / "filler", for_wal=number % 2 == 0)
                seconds = stage.settle("a full disk")
                print(
                    f"{number:>3}/{num_rounds} disk full: Postgres {outcome}; projected after {seconds:.1f} s",
                    flush=True,
                )
    print("all rounds passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
