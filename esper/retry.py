"""Trying again for as long as it takes, with exponential waits and jitter: stamina's, in one place."""

from typing import Any

import stamina


def retry_forever(on: type[Exception], first_s: float, longest_s: float) -> Any:
    """stamina's retry context without an end: who gives up sets a deadline around it, or returns from within.

    Args:
        first_s: the first wait, and the most that jitter adds to one.
        longest_s: the longest wait.
    """
    return stamina.retry_context(
        on=on, attempts=None, timeout=None, wait_initial=first_s, wait_max=longest_s, wait_jitter=first_s
    )
