"""A limit of time for code that runs in the caller's own thread: a seed that hangs is interrupted.

One daemon thread looks at the calls under way and raises ``SeedTimeoutError`` inside those that
are over their limit. It reaches Python code; a single long call into C ends first.
Invariant: the error is raised inside the limited block or not at all.
"""

import ctypes
import os
import threading
import time
from types import TracebackType

POLL_S = 0.02  # how far over its limit a call may be before it is seen
IDLE_S = 10.0  # the thread ends after so long without a call


class SeedTimeoutError(Exception):
    """A seed ran longer than its limit."""


class _Watch:
    """The calls under way, by thread, and the thread that looks at them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Know of no call and of no thread."""
        self.lock = threading.Lock()
        self.calls: dict[int, TimeLimit] = {}
        self._keeper: threading.Thread | None = None
        self._last_call_s = 0.0

    def begin(self, call: "TimeLimit") -> None:
        with self.lock:
            self.calls[call.thread_id] = call
            self._last_call_s = call.ends_at_s
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="esper-watchdog", daemon=True)
                self._keeper.start()

    def _keep(self) -> None:
        while True:
            time.sleep(POLL_S)
            now = time.monotonic()
            with self.lock:
                for call in self.calls.values():
                    if now > call.ends_at_s:  # again and again: a seed may catch it and go on
                        call.is_interrupted = True
                        thread = ctypes.c_ulong(call.thread_id)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(SeedTimeoutError))
                if not self.calls and now > self._last_call_s + IDLE_S:
                    self._keeper = None
                    return


_watch = _Watch()
os.register_at_fork(after_in_child=_watch.reset)  # no thread lives on there, and its lock may be held for ever


class TimeLimit:
    """``with TimeLimit(seconds):`` raises ``SeedTimeoutError`` inside the block when it takes longer. Not reentrant."""

    __slots__ = ("_seconds", "ends_at_s", "is_interrupted", "thread_id")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self.is_interrupted = False
        self.thread_id = threading.get_ident()
        self.ends_at_s = time.monotonic() + self._seconds
        _watch.begin(self)

    def __exit__(
        self, kind: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        with _watch.lock:
            _watch.calls.pop(self.thread_id, None)
        if self.is_interrupted and kind is not SeedTimeoutError:
            for _n in range(10_000):  # the error is on its way to this thread: let it arrive here, not in the host
                pass
            raise SeedTimeoutError
