"""Consumer of the fault suite: applies numbers to SQLite, each in one transaction with its position.

Usage: ``numbers_reader.py GROUP INSTANCE DATABASE``. A real ``GroupConsumer`` whose handler stores positions with its
rows. It detects a resend by the highest sequence, as the projections do, and has no other protection, so that a number
applied twice is visible. On SIGTERM it finishes and exits with 0.
"""

import asyncio
import signal
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from esper.config import load_settings
from esper.errors import ConflictError, UnavailableError
from esper.logging import configure_logging
from esper.oona.consumer.group_consumer import GroupConsumer, GroupConsumerOptions
from esper.oona.consumer.partition_reader import EventBatch
from esper.oona.records import TopicPartition
from esper.schemas.events import EpochCompleted, TrainerEvent
from esper.schemas.topics import RUNS, TELEMETRY

TABLES = """
CREATE TABLE IF NOT EXISTS positions (topic TEXT, log_partition INTEGER, next_offset INTEGER,
    PRIMARY KEY (topic, log_partition));
CREATE TABLE IF NOT EXISTS progress (run TEXT, incarnation INTEGER, topic TEXT, sequence INTEGER,
    PRIMARY KEY (run, incarnation, topic));
CREATE TABLE IF NOT EXISTS applied (id INTEGER PRIMARY KEY, run TEXT, topic TEXT, number INTEGER);
"""


class Ledger:
    """Database of one reader; several processes may have it open."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=20, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(TABLES)

    def close(self) -> None:
        self._database.close()

    async def positions(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        rows = self._database.execute("SELECT topic, log_partition, next_offset FROM positions").fetchall()
        return {(t, p): offset for t, p, offset in rows if (t, p) in partitions}

    async def apply(self, batch: EventBatch) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._apply(batch)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise

    def _apply(self, batch: EventBatch) -> None:
        where = (batch.topic, batch.partition)
        found = self._database.execute(
            "SELECT next_offset FROM positions WHERE topic = ? AND log_partition = ?", where
        ).fetchone()
        if found is not None and found[0] != batch.start:
            raise ConflictError(f"{where} is at {found[0]}, the batch starts at {batch.start}")
        for message, _position in batch.events:
            event = message.data
            assert isinstance(event, TrainerEvent)
            key = (event.run_id, event.incarnation, batch.topic)
            highest = self._database.execute(
                "SELECT sequence FROM progress WHERE run = ? AND incarnation = ? AND topic = ?", key
            ).fetchone()
            if highest is not None and event.sequence <= highest[0]:
                continue
            self._database.execute("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?)", (*key, event.sequence))
            number = event.epoch if isinstance(event, EpochCompleted) else event.sequence
            self._database.execute(
                "INSERT INTO applied (run, topic, number) VALUES (?, ?, ?)",
                (f"{event.run_id}/{event.incarnation}", batch.topic, number),
            )
        self._database.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", (*where, batch.end))


async def read() -> None:
    group, instance, ledger = sys.argv[1], sys.argv[2], Ledger(Path(sys.argv[3]))
    settings = load_settings()
    configure_logging(settings.logging)
    options = GroupConsumerOptions(instance_id=f"{group}-{instance}", session_timeout_s=6, stalled_after_s=60)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    while not stopping.is_set():
        consumer = GroupConsumer(
            settings.need_kafka(), group, (RUNS, TELEMETRY), ledger.apply,
            load_positions=ledger.positions, options=options,
        )  # fmt: skip
        try:
            async with consumer:
                print("reading", flush=True)
                running = asyncio.create_task(consumer.run())
                waiting = asyncio.create_task(stopping.wait())
                await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
                consumer.stop()
                waiting.cancel()
                await running
        except UnavailableError as error:  # an operator would restart it
            print(f"restarting: {error}", flush=True)


if __name__ == "__main__":
    asyncio.run(read())
