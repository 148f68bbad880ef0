"""Finds partitions that have unread records and make no progress.

Owns the offset and the idle time of each assigned partition, in memory. Reads nothing from Kafka: the caller
passes the ends of the log. Invariant: a partition that stalls is reported with its reason, never silently.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from esper.logging import get_logger
from esper.oona.records import TopicPartition

STALLED_AFTER_S = 30.0  # longer than a rebalance plus one long transaction, which are no stalls
NO_PROGRESS = "no progress"

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stall:
    """A partition that makes no progress. ``lag`` is in records; None where the end of the log is unknown."""

    topic: str
    partition: int
    offset: int
    lag: int | None
    idle_s: float
    reason: str

    def __str__(self) -> str:
        lag = "an unknown lag" if self.lag is None else f"a lag of {self.lag:,}"
        return (
            f"{self.topic}[{self.partition}] has been at offset {self.offset:,} with {lag} "
            f"for {self.idle_s:.0f} s: {self.reason}"
        )


@dataclass(slots=True)
class _Progress:
    offset: int
    since: float
    reason: str = NO_PROGRESS
    is_stopped: bool = False


class ProgressWatch:
    """Tracks the assigned partitions and finds those that stall.

    Args:
        stalled_after_s: how long a partition with unread records may make no progress.
        clock: returns monotonic seconds.
    """

    def __init__(self, stalled_after_s: float = STALLED_AFTER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stalled_after_s = stalled_after_s
        self._clock = clock
        self._progress: dict[TopicPartition, _Progress] = {}

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """The partitions that are tracked."""
        return frozenset(self._progress)

    def offsets(self) -> dict[TopicPartition, int]:
        """The next offset of each tracked partition."""
        return {tp: progress.offset for tp, progress in self._progress.items()}

    def assign(self, tp: TopicPartition, offset: int = 0) -> None:
        """Track a partition that is read from this offset (0 until the offset is known)."""
        self._progress[tp] = _Progress(offset, self._clock())

    def revoke(self, tp: TopicPartition) -> None:
        """Stop tracking a partition: another group member reads it now."""
        self._progress.pop(tp, None)

    def advance(self, tp: TopicPartition, offset: int) -> None:
        """Note that every record below ``offset`` is handled. A stopped partition stays stopped."""
        progress = self._progress.get(tp)
        if progress is None or offset <= progress.offset:
            return
        progress.offset, progress.since = offset, self._clock()
        if not progress.is_stopped:
            progress.reason = NO_PROGRESS

    def note_problem(self, tp: TopicPartition, reason: str) -> None:
        """Note why a partition makes no progress at the moment; the next ``advance`` clears the reason."""
        if tp in self._progress:
            self._progress[tp].reason = reason

    def stop(self, tp: TopicPartition, reason: str) -> None:
        """Note that a partition needs an operator before it can continue: it counts as stalled at once."""
        if tp in self._progress:
            self._progress[tp].reason = reason
            self._progress[tp].is_stopped = True

    def stalls(self, ends: Mapping[TopicPartition, int | None]) -> list[Stall]:
        """The partitions that stall, in order.

        Args:
            ends: the end of the log of each partition; None or missing where no broker reported it lately.
        """
        now, stalls = self._clock(), []
        for tp, progress in sorted(self._progress.items()):
            end = ends.get(tp)
            lag = None if end is None else max(0, end - progress.offset)
            idle_s = now - progress.since
            if lag == 0 and not progress.is_stopped:
                progress.since = now
            elif progress.is_stopped or idle_s >= self._stalled_after_s:
                is_explained = lag is not None or progress.is_stopped
                reason = progress.reason if is_explained else f"{progress.reason}; no broker answers"
                stalls.append(Stall(*tp, progress.offset, lag, idle_s, reason))
        return stalls


class StallReporter:
    """Logs each stall once when it begins and once when it ends.

    Args:
        component: the first word of the log events, as in ``consumer.stalled``.
        fields: added to every log entry.
    """

    def __init__(self, component: str, **fields: str) -> None:
        self._component, self._fields = component, fields
        self._reported: set[TopicPartition] = set()

    def report(self, stalls: Iterable[Stall]) -> None:
        """Log what changed since the last call."""
        current = {(s.topic, s.partition): s for s in stalls}
        for tp, stall in current.items():
            if tp not in self._reported:
                _log.error(f"{self._component}.stalled", **self._fields, **asdict(stall))
        for topic, partition in sorted(self._reported - current.keys()):
            _log.info(f"{self._component}.recovered", **self._fields, topic=topic, partition=partition)
        self._reported = set(current)
