"""Liveness and readiness of a process.

A process is live while its event loop runs; restart one that hangs. It is ready while all services
that it needs are reachable and none of its work is stopped; a restart does not help there, and the
problems name the cause.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

BEAT_S = 1.0  # between two heartbeats
DEAD_AFTER_S = 60.0  # without a heartbeat the process counts as hung; longer than any batch or tick blocks the loop


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a process is not ready. ``topic`` and ``partition`` are set if one partition is stopped or stalled."""

    reason: str
    topic: str | None = None
    partition: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Health:
    """The state behind ``/healthz`` and ``/readyz``.

    Args:
        problems: returns why the process is not ready now; called on the server's threads.
        clock: monotonic seconds.
    """

    def __init__(self, problems: Callable[[], Iterable[Problem]], clock: Callable[[], float] = time.monotonic) -> None:
        self._problems, self._clock = problems, clock
        self._last_beat = clock()

    async def keep_beating(self) -> None:
        """Send a heartbeat every ``BEAT_S`` seconds, until cancelled."""
        while True:
            self.beat()
            await asyncio.sleep(BEAT_S)

    def beat(self) -> None:
        """Record a heartbeat."""
        self._last_beat = self._clock()

    @property
    def silent_s(self) -> float:
        """Seconds since the last heartbeat."""
        return self._clock() - self._last_beat

    @property
    def is_live(self) -> bool:
        """Whether the event loop runs."""
        return self.silent_s < DEAD_AFTER_S

    def problems(self) -> list[Problem]:
        """Why the process is not ready; empty if it is."""
        found = list(self._problems())
        if not self.is_live:
            found.append(Problem(f"the process hangs: its event loop is blocked for {self.silent_s:.0f} s; restart it"))
        return found
