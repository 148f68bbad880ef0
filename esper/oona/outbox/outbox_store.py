"""Outbox: a trainer's events on its local disk until Kafka has acknowledged them.

A SQLite file in WAL mode. Invariant: an event survives SIGKILL and a power cut once ``append`` has returned, and is
sent at least once, in the order of appending. Two connections: one appends, with full syncs; the other reads and
deletes, so that the trainer never waits for the sender.

On a full disk ``append`` fails and nothing else does. SQLite needs disk space even to delete, so a second file holds
some in reserve: it is deleted when a delete or ``open`` fails, and written again when there is space.
"""

import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from esper.errors import ContractError, OutboxFullError, UnavailableError
from esper.logging import get_logger
from esper.oona.records import RECORD_LIMIT_BYTES, Record, headers_from_json, headers_to_json

CHECKPOINT_PAGES = 128  # pages of 4 KiB after which the WAL is checkpointed and reused
RESERVE_BYTES = 4 * 1024 * 1024  # a delete may need space for a checkpoint of the largest WAL
FULL_DISK_BATCH = 200  # records deleted at once on a full disk; larger batches grow the WAL further
BUSY_TIMEOUT_S = 5.0  # how long one connection waits for the other's transaction

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
-- the metadata; the table keeps the name that it has in existing files
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_INSERT = "INSERT INTO outbox (topic, key, value, headers, timestamp_ms) VALUES (?, ?, ?, ?, ?)"
_SET_METADATA = "INSERT INTO marks (name, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value"
_OLDEST = "SELECT id, topic, key, value, headers, timestamp_ms FROM outbox WHERE id > ? ORDER BY id LIMIT ?"
_REMOVE = "DELETE FROM outbox WHERE id <= ?"
_CHECKPOINT = "PRAGMA wal_checkpoint(TRUNCATE)"
_COPY_TO_REFUSED = """
INSERT OR REPLACE INTO refused
SELECT id, topic, key, value, headers, timestamp_ms, ? FROM outbox WHERE id = ?
"""

_log = get_logger(__name__)


class Outbox:
    """The outbox file of one trainer. Call ``open`` first and ``close`` at the end; thread-safe in between.

    Args:
        path: the database file; its folder is created if it is missing.
        max_pages: the size at which the outbox is full, in SQLite pages of 4 KiB; None for no limit but the disk.
    """

    def __init__(self, path: Path, *, max_pages: int | None = None) -> None:
        self.path = path
        self._max_pages = max_pages
        self._writer_lock, self._sender_lock = threading.Lock(), threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._sender: sqlite3.Connection | None = None
        self._num_appended = 0
        self._num_removed = 0
        self._sent_up_to = 0
        self._has_reserve = True  # so that its absence is logged once

    def open(self) -> None:
        """Open the file, with the events that an earlier process left in it. A full disk costs the reserve.

        Raises:
            UnavailableError: the file cannot be opened.
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
            self._write_reserve()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise UnavailableError(
                f"the outbox {self.path} cannot be opened: {error}. Free disk space; if the file is damaged or not "
                "Esper's, move it away, which loses the events in it that were not sent"
            ) from error
        self._num_removed = self._sent_up_to = 0

    def _open(self) -> None:
        self._writer = self._connect("FULL")
        self._sender = self._connect("NORMAL")
        self._writer.executescript(_TABLES)
        self._num_appended = int(self._writer.execute("SELECT count(*) FROM outbox").fetchone()[0])

    def close(self) -> None:
        """Close the file. The events in it stay."""
        for database in (self._writer, self._sender):
            if database is not None:
                database.close()
        self._writer = self._sender = None

    def append(self, records: Sequence[Record], metadata: Mapping[str, str] | None = None) -> None:
        """Append records in one transaction; they are on disk when this returns.

        Args:
            metadata: small texts by name, stored in the same transaction; each replaces the one of its name.

        Raises:
            OutboxFullError: the disk or the outbox is full; nothing was appended.
            ContractError: a record is too large for any broker, or names a partition, which is not stored.
        """
        for record in records:
            if record.partition is not None:
                raise ContractError(f"a record for {record.topic} names a partition: the outbox stores none")
            if record.size_bytes > RECORD_LIMIT_BYTES:
                raise ContractError(f"an event of {record.size_bytes:,} bytes for {record.topic} is too large")
        rows = [(r.topic, r.key, r.value, headers_to_json(r.headers), r.timestamp_ms) for r in records]
        with self._writer_lock:
            database = self._opened(self._writer)
            try:
                database.execute("BEGIN IMMEDIATE")
                database.executemany(_INSERT, rows)
                if metadata:
                    database.executemany(_SET_METADATA, list(metadata.items()))
                database.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                remedy = "free disk space" if "full" in str(error) else "growth pauses until it can be written again"
                raise OutboxFullError(f"the outbox {self.path} cannot be written: {error}; {remedy}") from error
            self._num_appended += len(rows)

    def metadata(self) -> dict[str, str]:
        """The newest metadata by name."""
        with self._writer_lock:
            return dict(self._opened(self._writer).execute("SELECT name, value FROM marks").fetchall())

    def oldest(self, limit: int) -> list[tuple[int, Record]]:
        """The next records to send with their ids, oldest first, at most ``limit``."""
        with self._sender_lock:
            rows = self._opened(self._sender).execute(_OLDEST, (self._sent_up_to, limit)).fetchall()
        return [(row[0], _to_record(row[1:])) for row in rows]

    def remove_up_to(self, last_id: int) -> None:
        """Delete the records up to and including ``last_id``, which Kafka has. Never fails for a full disk."""
        with self._sender_lock:
            database = self._opened(self._sender)
            count = "SELECT count(*) FROM outbox WHERE id > ? AND id <= ?"
            self._num_removed += int(database.execute(count, (self._sent_up_to, last_id)).fetchone()[0])
            self._sent_up_to = last_id
            try:
                database.execute(_REMOVE, (last_id,))
                self._write_reserve()
            except sqlite3.OperationalError:
                self._remove_on_full_disk(database, last_id)

    def remove(self, record_ids: Sequence[int]) -> None:
        """Delete single records, which Kafka has. On a full disk they stay, and are sent again."""
        with self._sender_lock:
            database = self._opened(self._sender)
            try:
                deleted = database.executemany("DELETE FROM outbox WHERE id = ?", [(i,) for i in record_ids])
                self._num_removed += max(0, deleted.rowcount)
            except sqlite3.OperationalError as error:
                _log.warning("outbox.delete_failed", path=str(self.path), records=len(record_ids), error=str(error))

    def copy_to_refused(self, record_id: int, reason: str) -> None:
        """Copy a record that no broker accepts to the table ``refused``, with the reason; ``remove_up_to`` deletes it.

        Raises:
            OutboxFullError: the disk is full; nothing was copied.
        """
        with self._sender_lock:
            try:
                self._opened(self._sender).execute(_COPY_TO_REFUSED, (reason, record_id))
            except sqlite3.OperationalError as error:
                raise OutboxFullError(
                    f"the outbox {self.path} cannot store a refused record: {error}; free disk space"
                ) from error

    def _remove_on_full_disk(self, database: sqlite3.Connection, last_id: int) -> None:
        """Delete with the reserve's disk space; if that fails too, a crash makes the records be sent again."""
        try:
            self._reserve.unlink(missing_ok=True)
            database.execute(_CHECKPOINT).fetchall()
            first = database.execute("SELECT min(id) FROM outbox").fetchone()[0]
            for up_to in (*range(first or last_id, last_id, FULL_DISK_BATCH), last_id):
                database.execute(_REMOVE, (up_to,))
                database.execute(_CHECKPOINT).fetchall()
            self._write_reserve()
        except (sqlite3.OperationalError, OSError) as error:
            _log.warning("outbox.delete_failed", path=str(self.path), up_to=last_id, error=str(error))

    @property
    def _reserve(self) -> Path:
        return self.path.with_suffix(".reserve")

    def _write_reserve(self) -> None:
        """Write the reserve file if the disk has space for it."""
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
        """The number of records that wait to be sent."""
        return max(0, self._num_appended - self._num_removed)

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={synchronous}")
        database.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        if self._max_pages is not None:
            database.execute(f"PRAGMA max_page_count={int(self._max_pages)}")
        return database

    def _opened(self, database: sqlite3.Connection | None) -> sqlite3.Connection:
        if database is None:
            raise UnavailableError(f"the outbox {self.path} is not open: call open() first")
        return database


def num_waiting_in(path: Path) -> int:
    """The number of waiting records in an outbox file, which may be in use; 0 if there is no file.

    Raises:
        UnavailableError: the file is not an outbox.
    """
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)) as database:
            return int(database.execute("SELECT count(*) FROM outbox").fetchone()[0])
    except sqlite3.Error as error:
        raise UnavailableError(f"{path} cannot be read as an outbox: {error}") from error


def _to_record(row: Sequence[Any]) -> Record:
    topic, key, value, headers, timestamp_ms = row
    return Record(topic, key, value, headers_from_json(headers), timestamp_ms)
