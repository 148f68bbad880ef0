"""Retry policies: how long to wait before the next attempt, and when to stop.

Every wait grows exponentially and is jittered, so that clients that failed together do not return together.
Which errors are worth a retry is not decided here: each vendor's module lists its transient errors
(``esper.oona.broker_errors``, ``esper.streams.database.postgres_errors``, ``esper.storage.s3_client``).

    async for attempt in retry_attempts(OSError, 3, 0.1, 2.0):
        with attempt:
            return await connect()

A retry until a deadline is ``retry_forever`` inside ``asyncio.timeout``.
"""

import asyncio
import random
from types import TracebackType
from typing import Self

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


class Attempt:
    """A context manager around one attempt. Suppresses an error that is retried, and keeps it in ``error``.

    ``number`` counts from 1.
    """

    def __init__(self, number: int, on: Errors) -> None:
        self.number = number
        self.error: BaseException | None = None
        self._on = on

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, self._on)


class Attempts:
    """Iterates over attempts until one succeeds, with a wait before each but the first."""

    def __init__(self, on: Errors, num_attempts: int | None, backoff: Backoff) -> None:
        self._on, self._num_attempts, self._backoff = on, num_attempts, backoff
        self._last: Attempt | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Attempt:
        number = 1
        if self._last is not None:
            if self._last.error is None:
                raise StopAsyncIteration
            await self._backoff.wait()
            number += self._last.number
        self._last = Attempt(number, () if number == self._num_attempts else self._on)
        return self._last


def retry_forever(on: Errors, first_s: float, longest_s: float) -> Attempts:
    """Retry without limit where an attempt raises ``on``; other errors propagate. Waits as ``Backoff``."""
    return Attempts(on, None, Backoff(first_s, longest_s))


def retry_attempts(on: Errors, num_attempts: int, first_s: float, longest_s: float) -> Attempts:
    """As ``retry_forever``, but the error of the ``num_attempts``-th attempt propagates."""
    return Attempts(on, num_attempts, Backoff(first_s, longest_s))
