"""A circuit breaker for each awake seed: when it may run, and when it is given up.

    closed     the seed runs
    open       it does not: 3 failures in a row, or one output that was not finite
    half-open  60 s later it runs again: what it does then closes or opens the breaker

Owns the state and its clock; who calls the seed tells it what happened. A breaker that opens
twice in a row without closing means that the seed should be given up.
"""

import time
from collections.abc import Callable
from typing import Any

from esper.schemas.enums import BreakerState

FAILURES_TO_OPEN = 3
OPEN_S = 60.0
OPENINGS_TO_GIVE_UP = 2


class Breaker:
    """One seed's. ``clock`` gives seconds that only rise.

    Attributes:
        state: how it stands.
        num_failures: failures in a row.
        detail: what the newest failure was.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = BreakerState.CLOSED
        self.num_failures = 0
        self.detail = ""
        self._clock = clock
        self._opened_at_s = 0.0
        self._num_openings = 0
        self._has_opened = False

    def __getstate__(self) -> dict[str, Any]:
        # a monotonic clock has another zero in another process: what is kept is how long ago it was
        return {**self.__dict__, "_opened_at_s": self._opened_at_s - self._clock()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened_at_s += self._clock()

    @property
    def should_give_up(self) -> bool:
        """Whether the seed failed its trial too."""
        return self._num_openings >= OPENINGS_TO_GIVE_UP

    def lets_through(self) -> bool:
        """Whether the seed may run now."""
        if self.state is BreakerState.OPEN and self._clock() >= self._opened_at_s + OPEN_S:
            self.state = BreakerState.HALF_OPEN
        return self.state is not BreakerState.OPEN

    def succeeded(self) -> None:
        """The seed ran, and well."""
        if self.num_failures:
            self.state, self.num_failures, self._num_openings = BreakerState.CLOSED, 0, 0

    def failed(self, detail: str, *, is_grave: bool = False) -> None:
        """The seed failed. A grave failure, such as an output that is not finite, opens at once."""
        self.num_failures += 1
        self.detail = detail
        is_trial = self.state is BreakerState.HALF_OPEN
        if self.state is not BreakerState.OPEN and (is_grave or is_trial or self.num_failures >= FAILURES_TO_OPEN):
            self.state = BreakerState.OPEN
            self._opened_at_s = self._clock()
            self._num_openings += 1
            self._has_opened = True

    def take_opening(self) -> bool:
        """Whether it opened since the last call."""
        opened, self._has_opened = self._has_opened, False
        return opened

    def opened_elsewhere(self, *, gives_up: bool) -> None:
        """The breaker of the same seed opened on another rank of the run: so does this one."""
        if self.state is not BreakerState.OPEN:
            self.failed("it failed on another rank", is_grave=True)
        self._has_opened = False
        if gives_up:
            self._num_openings = OPENINGS_TO_GIVE_UP
