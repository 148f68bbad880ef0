"""Postgres on a disk that gets really full under workers: a script for tests/support/processes/small_disk.py.

``full_disk_storm.py FOLDER ROUNDS SEED``. ``FOLDER/postgres`` is the small disk; the log is beside it.
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


def use_up(filler: Path) -> None:
    """Take what room is left."""
    with filler.open("ab", buffering=0) as file:
        for size in (2**20, 2**13):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def disk_full(stage: StreamsStorm, filler: Path, *, for_wal: bool) -> str:
    """Fill the disk until a worker says that it does not get on, then make room; what became of Postgres.

    Args:
        for_wal: leave no room for the write-ahead log either, which is the end of a Postgres.
    """
    postgres = stage.stack.postgres
    before = set(stage.told(STALLED))
    use_up(filler)
    if for_wal:
        with suppress(psycopg.OperationalError), psycopg.connect(postgres.dsn, autocommit=True) as connection:
            for _ in range(20):
                connection.execute("SELECT pg_logical_emit_message(true, 'storm', 'x'), pg_switch_wal()")
    wait_until(lambda: set(stage.told(STALLED)) - before, 120, "a word about the full disk")
    assert for_wal or any("No space left" in line for line in set(stage.told(STALLED)) - before), stage.logs()
    filler.unlink()
    if ended := not postgres.is_alive:
        postgres.start()
    wait_until(lambda: _answers(postgres.dsn) or not postgres.is_alive, 60, "Postgres, with room again")
    return "ended and was started again" if ended else "lived on"


def _answers(dsn: str) -> bool:
    with suppress(psycopg.OperationalError), psycopg.connect(dsn) as connection:
        return connection.execute("SELECT 1").fetchone() is not None
    return False


def main(folder: Path, num_rounds: int, seed: int) -> None:
    """See the module."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it tells of each record that waits for a new leader
    with EmbeddedStack(folder) as stack:
        settings = stack.settings()
        asyncio.run(apply_topics(settings.need_kafka()))
        migrate(settings.need_postgres())
        with streams_storm(stack, folder, random.Random(seed)) as stage:
            stage.begin()
            for number in range(1, num_rounds + 1):
                became = disk_full(stage, folder / "postgres" / "filler", for_wal=number % 2 == 0)
                seconds = stage.settle("a full disk")
                print(
                    f"{number:>3}/{num_rounds} disk full: Postgres {became}; folded after {seconds:.1f} s", flush=True
                )
    print("whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
