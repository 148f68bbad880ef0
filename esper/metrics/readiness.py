"""Health: whether a process lives, and what keeps it from being ready.

A process is live while its event loop turns: one that hangs should be started again. It is ready while nothing that
it needs is away and nothing that it does is stopped; a new start would not help there, and the problems say what does.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

BEAT_S = 1.0  # between two signs of life
DEAD_AFTER_S = 60.0  # longer than any batch or tick holds the loop; then the process counts as hung


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a process is not ready. ``topic`` and ``partition`` where it is one partition that does not get on."""

    reason: str
    topic: str | None = None
    partition: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without what it does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Health:
    """What ``/healthz`` and ``/readyz`` answer from.

    Args:
        problems: gives what keeps the process from being ready now; called on the server's threads.
        clock: monotonic seconds.
    """

    def __init__(self, problems: Callable[[], Iterable[Problem]], clock: Callable[[], float] = time.monotonic) -> None:
        self._problems, self._clock = problems, clock
        self._last_beat = clock()

    async def keep_beating(self) -> None:
        """Give a sign of life every second, for as long as the event loop turns."""
        while True:
            self.beat()
            await asyncio.sleep(BEAT_S)

    def beat(self) -> None:
        """A sign of life."""
        self._last_beat = self._clock()

    @property
    def silent_s(self) -> float:
        """How long ago the last sign of life was."""
        return self._clock() - self._last_beat

    @property
    def is_live(self) -> bool:
        """Whether the process gets on at all."""
        return self.silent_s < DEAD_AFTER_S

    def problems(self) -> list[Problem]:
        """What keeps the process from being ready; nothing where it is."""
        found = list(self._problems())
        if not self.is_live:
            found.append(Problem(f"the process hangs: its event loop has not turned for {self.silent_s:.0f} s"))
        return found
