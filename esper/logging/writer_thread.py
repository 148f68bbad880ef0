"""The thread that writes log lines, and the queue before it.

Owns the queue, the thread and the count of lost lines; knows nothing of structlog or settings.
Invariant: ``put`` neither waits nor raises, with a full queue, a full disk, a closed stderr, in a
forked child and while the interpreter ends.
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

MAX_WAITING = 10_000  # entries; at some 1 kB each they are not felt
MAX_BATCH = 200  # lines in one write
NAP_S = 0.01  # between two looks at the queue: a thread that waits on it is woken at its caller's cost
MAX_NAPS = 50  # without an entry; then it waits, and the next caller pays for waking it
FLUSH_S = 2.0  # how long the end of a process waits for its last lines

_Item = LogEntry | threading.Event | None  # a line, a mark to set when everything before it is written, the end


class FileDescriptorSink:
    """Writes bytes to a descriptor. Past Python's own buffers: a fork could copy their locks while held."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_torn = False

    def __call__(self, data: bytes) -> None:
        """Write all of it, however long the reader takes.

        Raises:
            OSError: it cannot be written.
        """
        rest = memoryview(b"\n" + data if self._is_torn else data)
        self._is_torn = False
        while rest:
            try:
                num_written = os.write(self._descriptor, rest)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
                continue
            except OSError:
                self._is_torn = len(rest) < len(data)
                raise
            rest = rest[num_written:]


class LogWriter:
    """A queue and a thread that starts with the first entry, in a forked child again.

    Args:
        render: makes an entry's line; called on the writer's thread.
        sink: takes the bytes of some lines; may raise.
        max_waiting: entries in the queue; more are dropped and counted.
    """

    def __init__(
        self, render: Callable[[LogEntry], str], sink: Callable[[bytes], None], *, max_waiting: int = MAX_WAITING
    ) -> None:
        self._render = render
        self._sink = sink
        self._max_waiting = max_waiting
        self._is_closed = False
        self._begin()
        _writers.add(self)
        multiprocessing.util.register_after_fork(self, LogWriter._flush_at_end_of_child)

    def _begin(self) -> None:
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()  # its put is safe in signal handlers
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._num_lost = 0

    @property
    def num_lost(self) -> int:
        """Lines lost and not told yet."""
        return self._num_lost

    def put(self, entry: LogEntry) -> None:
        """Leave an entry for the thread. Dropped and counted where the queue is full."""
        try:
            if self._queue.qsize() >= self._max_waiting:
                self._count_lost(1)
                return
            if self._thread is None and not self._start():
                self._write([entry])  # closed: the process ends
                return
            self._queue.put(entry)
        except Exception:
            self._count_lost(1)

    def flush(self, deadline_s: float = FLUSH_S) -> bool:
        """Wait until everything put so far is written; False where that takes longer."""
        if self._thread is None or self._thread is threading.current_thread():
            return self._thread is None
        done = threading.Event()
        self._queue.put(done)
        return done.wait(deadline_s)

    def close(self, deadline_s: float = FLUSH_S) -> None:
        """Write what waits, and end the thread. Entries that come later are written by their callers."""
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
            entries, mark = self._next_entries()
            self._write(entries)
            if mark is None:
                return
            mark.set()

    def _next_entries(self) -> tuple[list[LogEntry], threading.Event | None]:
        """What waits, up to a mark; None in its place is the end."""
        entries: list[LogEntry] = []
        item = self._first()
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

    def _first(self) -> _Item:
        for _nap in range(MAX_NAPS):
            if not self._queue.empty():
                break
            time.sleep(NAP_S)
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
        except Exception:  # stderr is closed, the disk is full: nobody is left to tell
            self._count_lost(len(entries) - (num_lost > 0))

    def _count_lost(self, num: int) -> None:
        with self._lock:
            self._num_lost += num

    def _flush_at_end_of_child(self) -> None:
        # a multiprocessing child (a DataLoader's worker) ends by os._exit: no atexit runs in it
        multiprocessing.util.Finalize(None, self.flush, exitpriority=0)


_writers: weakref.WeakSet[LogWriter] = weakref.WeakSet()


def _begin_again_in_child() -> None:
    """The parent writes what waited; its thread and its locks do not exist here."""
    for writer in list(_writers):
        writer._begin()


os.register_at_fork(after_in_child=_begin_again_in_child)
