"""The outbox: a trainer's events wait on its own disk until Kafka has them.

SQLite in WAL mode with full syncs. Invariant: what ``append`` has returned from survives
SIGKILL and goes out in the order of appending, at least once.
"""

import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.errors import OutboxFullError, UnavailableError
from esper.oona.records import Record

_TABLE = """
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
    headers TEXT NOT NULL, timestamp_ms INTEGER NOT NULL
)
"""
_INSERT = "INSERT INTO outbox (topic, key, value, headers, timestamp_ms) VALUES (?, ?, ?, ?, ?)"
_OLDEST = "SELECT id, topic, key, value, headers, timestamp_ms FROM outbox ORDER BY id LIMIT ?"


class Outbox:
    """One file, one trainer. Safe to use from several threads; ``close`` when done.

    Args:
        path: the database file; its folder is made when it is missing.
        max_pages: the size at which it counts as full, in SQLite pages of 4 KiB.
    """

    def __init__(self, path: Path, *, max_pages: int | None = None) -> None:
        self._path = path
        self._max_pages = max_pages
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file and recover what an earlier process left in it.

        Raises:
            UnavailableError: the file cannot be used.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.execute(_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(f"the outbox {self._path} cannot be used: {error}") from error
        if self._max_pages is not None:
            database.execute(f"PRAGMA max_page_count={int(self._max_pages)}")
        self._database = database

    def close(self) -> None:
        """Close the file. What is in it stays."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def append(self, records: Sequence[Record]) -> None:
        """Add records, all or none, and return when they are on disk.

        Raises:
            OutboxFullError: there is no room; nothing was added.
        """
        rows = [(r.topic, r.key, r.value, _headers_to_text(r), r.timestamp_ms) for r in records]
        with self._lock:
            database = self._opened()
            try:
                database.execute("BEGIN IMMEDIATE")
                database.executemany(_INSERT, rows)
                database.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise OutboxFullError(f"the outbox {self._path} took nothing: {error}; free some disk") from error

    def oldest(self, limit: int) -> list[tuple[int, Record]]:
        """The next records to send, with their ids, oldest first."""
        with self._lock:
            rows = self._opened().execute(_OLDEST, (limit,)).fetchall()
        return [(row[0], _to_record(row[1:])) for row in rows]

    def remove_up_to(self, last_id: int) -> None:
        """Forget the records up to and with ``last_id``: Kafka has them."""
        with self._lock:
            self._opened().execute("DELETE FROM outbox WHERE id <= ?", (last_id,))

    def __len__(self) -> int:
        with self._lock:
            return int(self._opened().execute("SELECT count(*) FROM outbox").fetchone()[0])

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise UnavailableError(f"the outbox {self._path} is not open")
        return self._database


def _headers_to_text(record: Record) -> str:
    return json.dumps([[name, text.decode()] for name, text in record.headers])


def _to_record(row: Sequence[Any]) -> Record:
    topic, key, value, headers, timestamp_ms = row
    named = tuple((name, text.encode()) for name, text in json.loads(headers))
    return Record(topic, key, value, named, timestamp_ms)
