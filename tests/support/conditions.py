"""Waiting on a condition with a deadline: what tests do instead of sleeping."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

POLL_S = 0.05
T = TypeVar("T")


def wait_until(condition: Callable[[], T], deadline_s: float = 30.0, what: str = "the condition") -> T:
    """Give back the first truthy value of ``condition``; fail after ``deadline_s``."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {deadline_s:.0f} s"
        time.sleep(POLL_S)
    return value


async def wait_until_async(
    condition: Callable[[], Awaitable[T]], deadline_s: float = 30.0, what: str = "the condition"
) -> T:
    """The same for a coroutine function."""
    end = time.monotonic() + deadline_s
    while not (value := await condition()):
        assert time.monotonic() < end, f"{what} did not come true within {deadline_s:.0f} s"
        await asyncio.sleep(POLL_S)
    return value
