"""Watches that reading gets on: whoever has something to read and does not is named, never silent."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from esper.logging import get_logger
from esper.oona.records import TopicPartition

STALLED_AFTER_S = 30.0  # longer than a rebalance and one long transaction; a stall is known this late
NO_PROGRESS = "no progress"

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stall:
    """A partition that does not get on. ``lag`` is None where nobody knows how long the log is."""

    topic: str
    partition: int
    offset: int
    lag: int | None
    idle_s: float
    reason: str

    def __str__(self) -> str:
        lag = "an unknown lag" if self.lag is None else f"a lag of {self.lag:,}"
        return (
            f"{self.topic}[{self.partition}] stands at offset {self.offset:,} with {lag}, "
            f"for {self.idle_s:.0f} s: {self.reason}"
        )


@dataclass(slots=True)
class _Standing:
    offset: int
    since: float
    reason: str = NO_PROGRESS
    is_red: bool = False


class ProgressWatch:
    """Which of the assigned partitions stall.

    Args:
        stalled_after_s: how long a partition with records left may stand still.
        clock: monotonic seconds.
    """

    def __init__(self, stalled_after_s: float = STALLED_AFTER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stalled_after_s = stalled_after_s
        self._clock = clock
        self._standings: dict[TopicPartition, _Standing] = {}

    @property
    def places(self) -> frozenset[TopicPartition]:
        """The partitions that are watched."""
        return frozenset(self._standings)

    def offsets(self) -> dict[TopicPartition, int]:
        """How far each of them is."""
        return {place: standing.offset for place, standing in self._standings.items()}

    def begin(self, place: TopicPartition, offset: int = 0) -> None:
        """A partition was assigned, to be read from this offset (0 until that is known)."""
        self._standings[place] = _Standing(offset, self._clock())

    def end(self, place: TopicPartition) -> None:
        """A partition went to somebody else."""
        self._standings.pop(place, None)

    def reached(self, place: TopicPartition, offset: int) -> None:
        """Everything below ``offset`` is done with. A partition that was stopped stays so."""
        standing = self._standings.get(place)
        if standing is None or offset <= standing.offset:
            return
        standing.offset, standing.since = offset, self._clock()
        if not standing.is_red:
            standing.reason = NO_PROGRESS

    def troubled(self, place: TopicPartition, reason: str) -> None:
        """What keeps a partition from getting on, for now."""
        if place in self._standings:
            self._standings[place].reason = reason

    def stopped(self, place: TopicPartition, reason: str) -> None:
        """A partition that will not get on without somebody's help: unhealthy at once."""
        if place in self._standings:
            self._standings[place].reason = reason
            self._standings[place].is_red = True

    def stalls(self, ends: Mapping[TopicPartition, int | None]) -> list[Stall]:
        """The partitions that do not get on.

        Args:
            ends: the end of the log of each; None or missing where it was not heard of lately.
        """
        now, found = self._clock(), []
        for place, standing in sorted(self._standings.items()):
            end = ends.get(place)
            lag = None if end is None else max(0, end - standing.offset)
            idle_s = now - standing.since
            if lag == 0 and not standing.is_red:
                standing.since = now
            elif standing.is_red or idle_s >= self._stalled_after_s:
                reason = (
                    standing.reason if lag is not None or standing.is_red else f"{standing.reason}; no broker answers"
                )
                found.append(Stall(*place, standing.offset, lag, idle_s, reason))
        return found


class StallReporter:
    """Tells of each stall once, and of its end.

    Args:
        reader: who reads; the first word of the log's events.
    """

    def __init__(self, reader: str, **fields: str) -> None:
        self._reader, self._fields = reader, fields
        self._told: set[TopicPartition] = set()

    def tell(self, stalls: Iterable[Stall]) -> None:
        """Log what is new since the last call."""
        current = {(s.topic, s.partition): s for s in stalls}
        for place, stall in current.items():
            if place not in self._told:
                _log.error(f"{self._reader}.stalled", **self._fields, **asdict(stall))
        for topic, partition in sorted(self._told - current.keys()):
            _log.info(f"{self._reader}.recovered", **self._fields, topic=topic, partition=partition)
        self._told = set(current)
