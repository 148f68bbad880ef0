"""The outbox: a trainer's events wait on its own disk until Kafka has them.

SQLite in WAL mode. Invariant: what ``append`` has returned from survives SIGKILL and a power cut, and
goes out in the order of appending, at least once. Two connections: one appends, with full syncs; one
reads and removes, so that the trainer never waits for whoever sends.

On a full disk ``append`` refuses and nothing else breaks. SQLite needs room even to remove, so some is
held in reserve in a file beside; given up when a removal or ``open`` fails, taken again when there is room.
"""

import base64
import json
import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from esper.errors import ContractError, OutboxFullError, UnavailableError
from esper.logging import get_logger
from esper.oona.records import RECORD_LIMIT_BYTES, Record

CHECKPOINT_PAGES = 128  # the WAL goes back to its start after so many pages of 4 KiB
RESERVE_BYTES = 4 * 1024 * 1024  # room for a checkpoint of the largest WAL, which a removal may need
REMOVED_AT_ONCE = 200  # on a full disk: the more, the larger the WAL gets
BUSY_S = 5.0  # how long one connection waits for the other's transaction

_TABLES = """
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL, key BLOB, value BLOB,
    headers TEXT NOT NULL, timestamp_ms INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS refused (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, key BLOB, value BLOB,
    headers TEXT NOT NULL, timestamp_ms INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_INSERT = "INSERT INTO outbox (topic, key, value, headers, timestamp_ms) VALUES (?, ?, ?, ?, ?)"
_MARK = "INSERT INTO marks (name, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value"
_OLDEST = "SELECT id, topic, key, value, headers, timestamp_ms FROM outbox WHERE id > ? ORDER BY id LIMIT ?"
_REMOVE = "DELETE FROM outbox WHERE id <= ?"
_CHECKPOINT = "PRAGMA wal_checkpoint(TRUNCATE)"
_SET_ASIDE = """
INSERT OR REPLACE INTO refused
SELECT id, topic, key, value, headers, timestamp_ms, ? FROM outbox WHERE id = ?
"""

_log = get_logger(__name__)


class Outbox:
    """One file, one trainer. Safe to use from several threads; ``close`` when done.

    Args:
        path: the database file; its folder is made when it is missing.
        max_pages: the size at which it counts as full, in SQLite pages of 4 KiB.
    """

    def __init__(self, path: Path, *, max_pages: int | None = None) -> None:
        self.path = path
        self._max_pages = max_pages
        self._appending, self._sending = threading.Lock(), threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._sender: sqlite3.Connection | None = None
        self._num_appended = 0
        self._num_removed = 0
        self._sent_up_to = 0
        self._has_reserve = True  # so that its absence is told once

    def open(self) -> None:
        """Open the file and recover what an earlier process left in it; on a full disk with the reserve.

        Raises:
            UnavailableError: the file cannot be used.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.OperationalError:
                if not self._reserve.exists():
                    raise
                self.close()
                self._reserve.unlink()
                self._open()
            self._take_reserve()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise UnavailableError(
                f"the outbox {self.path} cannot be used: {error}. Is the disk full, or is it no file of Esper's? "
                "Free some disk, or move it aside: the events in it that Kafka does not have are lost then"
            ) from error
        self._num_removed = self._sent_up_to = 0

    def _open(self) -> None:
        self._writer = self._connect("FULL")
        self._sender = self._connect("NORMAL")
        self._writer.executescript(_TABLES)
        self._num_appended = int(self._writer.execute("SELECT count(*) FROM outbox").fetchone()[0])

    def close(self) -> None:
        """Close the file. What is in it stays."""
        for database in (self._writer, self._sender):
            if database is not None:
                database.close()
        self._writer = self._sender = None

    def append(self, records: Sequence[Record], marks: Mapping[str, str] | None = None) -> None:
        """Add records, all or none, and return when they are on disk.

        Args:
            marks: small texts kept with them by name, in the same transaction.

        Raises:
            OutboxFullError: there is no room; nothing was added.
            ContractError: a record is too large for any broker, or names a partition, which is not kept.
        """
        for record in records:
            if record.partition is not None:
                raise ContractError(f"an outbox keeps no partition, and a record for {record.topic} names one")
            if record.size_bytes > RECORD_LIMIT_BYTES:
                raise ContractError(f"an event of {record.size_bytes:,} bytes for {record.topic} is too large")
        rows = [(r.topic, r.key, r.value, _headers_to_text(r), r.timestamp_ms) for r in records]
        with self._appending:
            database = self._opened(self._writer)
            try:
                database.execute("BEGIN IMMEDIATE")
                database.executemany(_INSERT, rows)
                if marks:
                    database.executemany(_MARK, list(marks.items()))
                database.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                told = "free some disk" if "full" in str(error) else "growth waits until it can be written again"
                raise OutboxFullError(f"the outbox {self.path} took nothing: {error}; {told}") from error
            self._num_appended += len(rows)

    def marks(self) -> dict[str, str]:
        """The newest mark of each name."""
        with self._appending:
            return dict(self._opened(self._writer).execute("SELECT name, value FROM marks").fetchall())

    def oldest(self, limit: int) -> list[tuple[int, Record]]:
        """The next records to send, with their ids, oldest first."""
        with self._sending:
            rows = self._opened(self._sender).execute(_OLDEST, (self._sent_up_to, limit)).fetchall()
        return [(row[0], _to_record(row[1:])) for row in rows]

    def remove_up_to(self, last_id: int) -> None:
        """Forget the records up to and with ``last_id``: Kafka has them. Never fails for a full disk."""
        with self._sending:
            database = self._opened(self._sender)
            between = "SELECT count(*) FROM outbox WHERE id > ? AND id <= ?"
            self._num_removed += int(database.execute(between, (self._sent_up_to, last_id)).fetchone()[0])
            self._sent_up_to = last_id
            try:
                database.execute(_REMOVE, (last_id,))
                self._take_reserve()
            except sqlite3.OperationalError:
                self._remove_on_full_disk(database, last_id)

    def remove(self, record_ids: Sequence[int]) -> None:
        """Forget some records among others: Kafka has them. On a full disk they stay, and are sent again."""
        with self._sending:
            database = self._opened(self._sender)
            try:
                done = database.executemany("DELETE FROM outbox WHERE id = ?", [(i,) for i in record_ids])
                self._num_removed += max(0, done.rowcount)
            except sqlite3.OperationalError as error:
                _log.warning("outbox.delete_failed", path=str(self.path), records=len(record_ids), error=str(error))

    def set_aside(self, record_id: int, reason: str) -> None:
        """Move a record that no broker takes to the table ``refused``, where it is kept with the reason.

        Raises:
            OutboxFullError: there is no room to keep it; it stays where it is.
        """
        with self._sending:
            try:
                self._opened(self._sender).execute(_SET_ASIDE, (reason, record_id))
            except sqlite3.OperationalError as error:
                raise OutboxFullError(f"the outbox {self.path} could not set a record aside: {error}") from error

    def _remove_on_full_disk(self, database: sqlite3.Connection, last_id: int) -> None:
        """Give the reserve up and remove with it; where that fails too, the records are sent again after a crash."""
        try:
            self._reserve.unlink(missing_ok=True)
            database.execute(_CHECKPOINT).fetchall()
            first = database.execute("SELECT min(id) FROM outbox").fetchone()[0]
            for up_to in (*range(first or last_id, last_id, REMOVED_AT_ONCE), last_id):
                database.execute(_REMOVE, (up_to,))
                database.execute(_CHECKPOINT).fetchall()
            self._take_reserve()
        except (sqlite3.OperationalError, OSError) as error:
            _log.warning("outbox.delete_failed", path=str(self.path), up_to=last_id, error=str(error))

    @property
    def _reserve(self) -> Path:
        return self.path.with_suffix(".reserve")

    def _take_reserve(self) -> None:
        """Hold room on the disk, where there is some."""
        try:
            if not self._reserve.exists() or self._reserve.stat().st_size < RESERVE_BYTES:
                with self._reserve.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
            self._has_reserve = True
        except OSError as error:
            self._reserve.unlink(missing_ok=True)
            if self._has_reserve:
                _log.warning("outbox.reserve_failed", path=str(self._reserve), error=str(error))
            self._has_reserve = False

    def __len__(self) -> int:
        """How many records wait."""
        return max(0, self._num_appended - self._num_removed)

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={synchronous}")
        database.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        if self._max_pages is not None:
            database.execute(f"PRAGMA max_page_count={int(self._max_pages)}")
        return database

    def _opened(self, database: sqlite3.Connection | None) -> sqlite3.Connection:
        if database is None:
            raise UnavailableError(f"the outbox {self.path} is not open")
        return database


def waiting_in(path: Path) -> int:
    """How many records wait in an outbox that may be in use; read only, 0 where there is no file.

    Raises:
        UnavailableError: it is no outbox.
    """
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_S)) as database:
            return int(database.execute("SELECT count(*) FROM outbox").fetchone()[0])
    except sqlite3.Error as error:
        raise UnavailableError(f"{path} is no outbox that can be read: {error}") from error


def _headers_to_text(record: Record) -> str:
    return json.dumps([[n, None if t is None else base64.b64encode(t).decode()] for n, t in record.headers])


def _to_record(row: Sequence[Any]) -> Record:
    topic, key, value, headers, timestamp_ms = row
    named = tuple((n, None if t is None else base64.b64decode(t)) for n, t in json.loads(headers))
    return Record(topic, key, value, named, timestamp_ms)
