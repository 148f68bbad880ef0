"""Retry policies: how long to wait before the next attempt, and when to stop.

Every wait is jittered, so that clients that failed together do not return together.
Which errors are worth a retry is not decided here: each vendor's module lists its transient errors
(``esper.oona.broker_errors``, ``esper.streams.database.postgres_errors``, ``esper.storage.s3_client``).

    async for attempt in retry_attempts(OSError, 3, 0.1, 2.0):
        with attempt:
            return await connect()

A retry until a deadline is ``retry_forever`` inside ``asyncio.timeout``.
"""

import asyncio
import random
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, stop_never

Errors = type[Exception] | tuple[type[Exception], ...]

_jitter = random.SystemRandom()  # not the global generator: a training loop's random numbers must not depend on retries


class Backoff:
    """Waits for a loop that handles its own errors; each is half to all of a bound that doubles up to ``longest_s``.

    Args:
        first_s: the upper bound of the first wait, in seconds.
        longest_s: the upper bound of every wait, in seconds.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._bound_s = first_s

    def reset(self) -> None:
        """Start again from ``first_s``; called after a success."""
        self._bound_s = self._first_s

    def next_s(self) -> float:
        """The next wait, in seconds."""
        wait_s = self._bound_s * _jitter.uniform(0.5, 1.0)
        self._bound_s = min(2 * self._bound_s, self._longest_s)
        return wait_s

    async def wait(self) -> None:
        """Sleep for the next wait."""
        await asyncio.sleep(self.next_s())


def retry_forever(on: Errors, first_s: float, longest_s: float) -> AsyncRetrying:
    """Retry without limit where an attempt raises ``on``; other errors propagate. Waits as ``Backoff``."""
    return _retrying(on, stop_never, Backoff(first_s, longest_s))


def retry_attempts(on: Errors, num_attempts: int, first_s: float, longest_s: float) -> AsyncRetrying:
    """As ``retry_forever``, but the error of the ``num_attempts``-th attempt propagates."""
    return _retrying(on, stop_after_attempt(num_attempts), Backoff(first_s, longest_s))


def _retrying(on: Errors, stop: Any, backoff: Backoff) -> AsyncRetrying:
    def wait(_state: RetryCallState) -> float:
        return backoff.next_s()

    return AsyncRetrying(retry=retry_if_exception_type(on), stop=stop, wait=wait, reraise=True)
