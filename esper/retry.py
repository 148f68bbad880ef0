"""Retry policies: how long to wait before the next attempt, and when to stop.

Every wait grows exponentially and is jittered, so that clients that failed together do not return together.
Which errors are worth a retry is not decided here: each vendor's module lists its transient errors
(``esper.oona.broker_errors``, ``esper.streams.database.postgres_errors``, ``esper.storage.s3_client``).

A retry until a deadline is ``retry_forever`` inside ``asyncio.timeout``.
"""

import asyncio
import random
from typing import Any

import stamina

Errors = type[Exception] | tuple[type[Exception], ...]


def retry_forever(on: Errors, first_s: float, longest_s: float) -> Any:
    """Retry without limit: ``async for attempt in retry_forever(...): with attempt: ...``.

    Args:
        on: the errors that are retried; any other one propagates.
        first_s: the first wait, and the upper bound of the jitter added to each wait.
        longest_s: the upper bound of every wait.
    """
    return stamina.retry_context(
        on=on, attempts=None, timeout=None, wait_initial=first_s, wait_max=longest_s, wait_jitter=first_s
    )


def retry_attempts(on: Errors, num_attempts: int, first_s: float, longest_s: float) -> Any:
    """Retry until ``num_attempts`` attempts have failed, then raise the last error. Arguments as ``retry_forever``."""
    return stamina.retry_context(
        on=on, attempts=num_attempts, timeout=None, wait_initial=first_s, wait_max=longest_s, wait_jitter=first_s
    )


class Backoff:
    """Waits for a loop that handles its own errors; each is half to all of a bound that doubles up to ``longest_s``."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._bound_s = first_s

    def reset(self) -> None:
        """Start again from ``first_s``; called after a success."""
        self._bound_s = self._first_s

    def next_s(self) -> float:
        """The next wait, in seconds."""
        wait_s = self._bound_s * random.uniform(0.5, 1.0)
        self._bound_s = min(2 * self._bound_s, self._longest_s)
        return wait_s

    async def wait(self) -> None:
        """Sleep for the next wait."""
        await asyncio.sleep(self.next_s())
