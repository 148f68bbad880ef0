"""Waits for a condition with a deadline; tests never sleep for a fixed time instead."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

POLL_S = 0.05
T = TypeVar("T")


def wait_until(condition: Callable[[], T], deadline_s: float = 30.0, what: str = "the condition") -> T:
    """Poll ``condition`` and return its first truthy value; fail after ``deadline_s``. ``what`` names it in the error."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {deadline_s:.0f} s"
        time.sleep(POLL_S)
    return value


async def wait_until_async(
    condition: Callable[[], Awaitable[T]], deadline_s: float = 30.0, what: str = "the condition"
) -> T:
    """``wait_until`` for a coroutine function."""
    end = time.monotonic() + deadline_s
    while not (value := await condition()):
        assert time.monotonic() < end, f"{what} did not come true within {deadline_s:.0f} s"
        await asyncio.sleep(POLL_S)
    return value
