"""Retry policies: which errors are retried, how often, and how long the waits are."""

import asyncio

import pytest

from esper.retry import Backoff, retry_attempts, retry_forever


async def test_retry_forever_ends_with_success() -> None:
    numbers = []
    async for attempt in retry_forever(OSError, 0.001, 0.001):
        with attempt:
            numbers.append(attempt.retry_state.attempt_number)
            if len(numbers) < 20:
                raise TimeoutError
    assert numbers == list(range(1, 21))


async def test_retry_attempts_raises_the_last_error() -> None:
    with pytest.raises(OSError, match="attempt 3"):
        async for attempt in retry_attempts(OSError, 3, 0.001, 0.001):
            with attempt:
                raise OSError(f"attempt {attempt.retry_state.attempt_number}")


async def test_other_errors_are_not_retried() -> None:
    with pytest.raises(ValueError, match="attempt 1"):
        async for attempt in retry_forever((OSError, KeyError), 0.001, 0.001):
            with attempt:
                raise ValueError(f"attempt {attempt.retry_state.attempt_number}")


async def test_cancellation_ends_an_attempt_and_a_wait() -> None:
    """CancelledError is no error that is retried, also where ``Exception`` is; a deadline around the retries works."""
    is_attempting = asyncio.Event()

    async def keep_failing(duration_s: float, wait_s: float) -> None:
        async for attempt in retry_forever(Exception, wait_s, wait_s):
            with attempt:
                is_attempting.set()
                await asyncio.sleep(duration_s)
                raise OSError

    for duration_s, wait_s in ((60.0, 0.001), (0.0, 60.0)):
        is_attempting.clear()
        task = asyncio.create_task(keep_failing(duration_s, wait_s))
        await is_attempting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await keep_failing(duration_s, wait_s)


def test_backoff_doubles_up_to_its_limit() -> None:
    backoff = Backoff(0.1, 0.4)
    for bound_s in (0.1, 0.2, 0.4, 0.4, 0.4):
        assert bound_s / 2 <= backoff.next_s() <= bound_s
    backoff.reset()
    assert backoff.next_s() <= 0.1
