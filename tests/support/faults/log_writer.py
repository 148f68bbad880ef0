"""Writes events to every topic, with garbage and resends among them, until it is stopped."""

import asyncio
import random
import threading
from datetime import UTC, datetime
from typing import Any

from support.events.event_examples import EXAMPLES
from support.faults.random_logs import GARBAGE, Recipe, event_record

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.producer import OonaProducer
from esper.oona.records import Record

BATCH_RECORDS = 40
PAUSE_S = 0.1  # between two batches: about 400 records per second
GARBAGE_SHARE, RESEND_SHARE = 0.02, 0.05
REDRIVEN = "esper.dead-letter.redriven.v1"  # only `esper dlq redrive` sends it


class LogWriter:
    """Context manager around a thread with its own event loop. The random numbers determine the records."""

    def __init__(self, kafka: KafkaSettings, rng: random.Random) -> None:
        self.num_written = 0
        self._kafka, self._rng = kafka, rng
        self._sequences: dict[Any, int] = {}
        self._number = 0
        self._may_write, self._is_idle = threading.Event(), threading.Event()
        self._is_ending = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._write()), name="log-writer", daemon=True)
        self._examples = [n for n, e in enumerate(EXAMPLES) if e.type != REDRIVEN]

    def __enter__(self) -> "LogWriter":
        self._may_write.set()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_ending = True
        self._thread.join(120)

    def pause(self) -> None:
        """Stop writing, once the broker has acknowledged everything written so far."""
        self._is_idle.clear()
        self._may_write.clear()
        assert self._is_idle.wait(90), "the writer did not stop"

    def resume(self) -> None:
        """Resume after ``pause``."""
        self._may_write.set()

    def batch(self, num_records: int, garbage: float = GARBAGE_SHARE) -> list[Record]:
        """Make the next records."""
        records: list[Record] = []
        for _ in range(num_records):
            self._number += 1
            recipe = Recipe("event", self._rng.choice(self._examples), self._rng.randrange(40), 0)
            event = event_record(recipe, self._number, self._sequences, datetime.now(UTC))
            value = self._rng.choice(GARBAGE) if self._rng.random() < garbage else event.value
            record = Record(event.position.topic, event.key, value, event.headers, event.timestamp_ms)
            records.append(record)
            if self._rng.random() < RESEND_SHARE:
                records.append(record)
        return records

    async def _write(self) -> None:
        async with OonaProducer(self._kafka) as producer:
            left: list[Record] = []
            while not self._is_ending:
                left = left or self.batch(BATCH_RECORDS)
                try:
                    await producer.send_records(left)
                except UnavailableError:
                    continue  # send all of it again: records that had arrived are resends
                self.num_written += len(left)
                left = []
                await asyncio.sleep(PAUSE_S)
                while not (self._may_write.is_set() or self._is_ending):
                    self._is_idle.set()
                    await asyncio.sleep(PAUSE_S)
