"""The thread that writes log lines, and its queue.

This module owns the queue, the thread and the count of lost lines. It does not depend on structlog
or on settings. Invariant: ``put`` never waits and never raises: not with a full queue, a full disk
or a closed stderr, not in a forked child, and not while the interpreter shuts down.
"""

import multiprocessing.util
import os
import queue
import select
import threading
import time
import weakref
from collections.abc import Callable

from esper.logging.log_entry import LogEntry

MAX_QUEUED = 10_000  # entries of about 1 kB each
MAX_BATCH = 200  # lines in one write
POLL_S = 0.01  # between two polls of the queue: waking a thread that blocks on it would cost the caller of put
MAX_POLLS = 50  # without an entry; then the thread blocks, and the next caller of put pays for waking it
FLUSH_TIMEOUT_S = 2.0  # for which the end of a process waits for its last lines

_Item = LogEntry | threading.Event | None
"""A line; an event to set when everything before it is written; or None to end the thread."""


class FileDescriptorSink:
    """Writes bytes to a file descriptor.

    It bypasses Python's buffers: a fork could copy their locks while they are held.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_line_incomplete = False

    def __call__(self, data: bytes) -> None:
        """Write all of ``data``; blocks while the reader is slow.

        Raises:
            OSError: the descriptor cannot be written.
        """
        rest = memoryview(b"\n" + data if self._is_line_incomplete else data)
        self._is_line_incomplete = False
        while rest:
            try:
                num_written = os.write(self._descriptor, rest)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
                continue
            except OSError:
                self._is_line_incomplete = len(rest) < len(data)
                raise
            rest = rest[num_written:]


class LogWriter:
    """A queue and a thread. The thread starts with the first entry, and again in a forked child.

    Args:
        render: renders an entry as a line; called on the writer thread.
        sink: writes the bytes of one or more lines; may raise.
        max_queued: maximum number of entries in the queue; further ones are dropped and counted.
    """

    def __init__(
        self, render: Callable[[LogEntry], str], sink: Callable[[bytes], None], *, max_queued: int = MAX_QUEUED
    ) -> None:
        self._render = render
        self._sink = sink
        self._max_queued = max_queued
        self._is_closed = False
        self._reset()
        _writers.add(self)
        multiprocessing.util.register_after_fork(self, LogWriter._flush_at_end_of_child)

    def _reset(self) -> None:
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()  # reentrant: safe in signal handlers
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._num_lost = 0

    @property
    def num_lost(self) -> int:
        """Number of lines lost since the last ``log.lost`` line."""
        return self._num_lost

    def put(self, entry: LogEntry) -> None:
        """Queue an entry. If the queue is full, the entry is dropped and counted."""
        try:
            if self._queue.qsize() >= self._max_queued:
                self._count_lost(1)
                return
            if self._thread is None and not self._start():
                self._write([entry])  # closed: the process is ending
                return
            self._queue.put(entry)
        except Exception:
            self._count_lost(1)

    def flush(self, deadline_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything queued so far is written; False if that takes longer than ``deadline_s``."""
        if self._thread is None or self._thread is threading.current_thread():
            return self._thread is None
        done = threading.Event()
        self._queue.put(done)
        return done.wait(deadline_s)

    def close(self, deadline_s: float = FLUSH_TIMEOUT_S) -> None:
        """Write the queued entries and end the thread. Later entries are written on their callers' threads."""
        self._is_closed = True
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        self._queue.put(None)
        thread.join(deadline_s)
        if not thread.is_alive():
            self._thread = None

    def _start(self) -> bool:
        with self._lock:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="esper-log", daemon=True)
                self._thread.start()
        return self._thread is not None

    def _run(self) -> None:
        while True:
            entries, written = self._next_batch()
            self._write(entries)
            if written is None:
                return
            written.set()

    def _next_batch(self) -> tuple[list[LogEntry], threading.Event | None]:
        """Queued entries, and the event to set when they are written; None ends the thread."""
        entries: list[LogEntry] = []
        item = self._wait_for_item()
        while True:
            if not isinstance(item, LogEntry):
                return entries, item
            entries.append(item)
            if len(entries) == MAX_BATCH:
                return entries, threading.Event()
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return entries, threading.Event()

    def _wait_for_item(self) -> _Item:
        for _poll in range(MAX_POLLS):
            if not self._queue.empty():
                break
            time.sleep(POLL_S)
        return self._queue.get()

    def _write(self, entries: list[LogEntry]) -> None:
        num_lost = self._num_lost
        try:
            if num_lost:
                lost = LogEntry(time.time(), "warning", __name__, "log.lost", {"n": num_lost})
                entries = [*entries, lost]
            if entries:
                self._sink("".join(map(self._render, entries)).encode(errors="backslashreplace"))
            self._count_lost(-num_lost)
        except Exception:  # stderr is closed or the disk is full: count the lines and log the count later
            self._count_lost(len(entries) - (num_lost > 0))

    def _count_lost(self, num: int) -> None:
        with self._lock:
            self._num_lost += num

    def _flush_at_end_of_child(self) -> None:
        # a multiprocessing child, such as a DataLoader worker, ends with os._exit, which skips atexit
        multiprocessing.util.Finalize(None, self.flush, exitpriority=0)


_writers: weakref.WeakSet[LogWriter] = weakref.WeakSet()


def _reset_in_child() -> None:
    """Start afresh in a forked child: the parent's thread does not exist here, and the parent writes its queue."""
    for writer in list(_writers):
        writer._reset()


os.register_at_fork(after_in_child=_reset_in_child)
