"""One fetch for many waiters: who leads a fetch, and how all others learn how it ended.

Blocking callers wait on the claim's future, asyncio wraps it. Invariant: every flight lands,
however its leader leaves, and lands once.
"""

from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from esper.kasmina.kernels import LoadedKernel


class Flight:
    """A fetch under way. ``is_wanted``: somebody waits for it; a prefetch is not until one does."""

    __slots__ = ("future", "is_wanted")

    def __init__(self, *, is_wanted: bool) -> None:
        self.future: Future[LoadedKernel | None] = Future()
        self.future.set_running_or_notify_cancel()  # a waiter that is cancelled does not cancel the others
        self.is_wanted = is_wanted


class Claim:
    """A caller's part in a fetch: who ``leads`` fetches and delivers, all others wait on ``future``.

    The leader uses it as a context manager. An error in it reaches every waiter. Where the leader
    goes without a kernel and without an error (it was cancelled), the future gives None: claim again.
    """

    def __init__(self, flight: Flight, *, leads: bool, land: Callable[[Flight, LoadedKernel | None], None]) -> None:
        self.future = flight.future
        self.leads = leads
        self._flight = flight
        self._land = land

    def deliver(self, kernel: LoadedKernel) -> None:
        """The leader has the kernel: it is kept, and every waiter gets it."""
        self._land(self._flight, kernel)
        self.future.set_result(kernel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if not self.leads or self.future.done():
            return
        self._land(self._flight, None)
        if isinstance(error, Exception):
            self.future.set_exception(error)
        else:
            self.future.set_result(None)
