"""The boundaries that wait for a decision: since when, which may be decided now, and which have been.

Owns no I/O. Invariant: a boundary is held back for ``stale_after_s`` at most, whatever is wrong with it, and what is
remembered of it goes when the projections do not show it as undecided any more.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from esper.streams.read_models.pending_boundaries import PendingBoundary, UncommandedDecision

RETRY_BROKEN_S = (0.2, 2.0)  # first and longest wait before the view of a broken boundary is read again
RESEND_AFTER_S = 2.0  # a command may take this long to be projected before it is sent again
GRACE_S = 0.3  # whoever made a decision is given this long to send its command


@dataclass(slots=True)
class _Known:
    seen_at: float
    retry_at: float = 0.0
    wait_s: float = RETRY_BROKEN_S[0]
    is_decided: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """What can be decided now: boundaries whose view can be read, and those that waited for too long."""

    complete: list[PendingBoundary] = field(default_factory=list)
    stale: list[PendingBoundary] = field(default_factory=list)


class PendingBoundaryQueue:
    """What one controller knows of the boundaries it looks at."""

    def __init__(self, stale_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_after_s, self._clock = stale_after_s, clock
        self._known: dict[UUID, _Known] = {}
        self._undone: dict[UUID, float] = {}

    def look(self, pending: Sequence[PendingBoundary]) -> list[PendingBoundary]:
        """Take note of what the projections show as undecided; gives those that nobody here decided yet."""
        now = self._clock()
        self._known = {p.event_id: self._known.get(p.event_id) or _Known(now) for p in pending}
        return [p for p in pending if not self._known[p.event_id].is_decided]

    def due(self, waiting: Iterable[PendingBoundary]) -> Due:
        """Those of ``waiting`` whose turn it is, those first that were seen first."""
        now, due = self._clock(), Due()
        for boundary in sorted(waiting, key=lambda p: self._known[p.event_id].seen_at):
            known = self._known[boundary.event_id]
            if boundary.is_complete and known.retry_at <= now:
                due.complete.append(boundary)
            elif not boundary.is_complete and now - known.seen_at >= self._stale_after_s:
                due.stale.append(boundary)
        return due

    def broke(self, boundary: PendingBoundary) -> bool:
        """Its view could not be made. Whether it waited for long enough; if not, it comes again in a while."""
        known, now = self._known[boundary.event_id], self._clock()
        if now - known.seen_at >= self._stale_after_s:
            return True
        known.retry_at = min(now + known.wait_s, known.seen_at + self._stale_after_s)
        known.wait_s = min(2 * known.wait_s, RETRY_BROKEN_S[1])
        return False

    def decided(self, boundary: PendingBoundary) -> float:
        """Its decision is in the log; gives for how long it waited here, in seconds."""
        known = self._known[boundary.event_id]
        known.is_decided = True
        return self._clock() - known.seen_at

    def left_undone(self, undone: Sequence[UncommandedDecision]) -> list[UncommandedDecision]:
        """The decisions whose command is to be sent (again) now."""
        now = self._clock()
        own = {event_id: at for event_id, at in self._undone.items() if now < at < math.inf}  # not folded yet
        self._undone = own | {d.event_id: self._undone.get(d.event_id, now + GRACE_S) for d in undone}
        return [d for d in undone if self._undone[d.event_id] <= now]

    def commanded(self, decision_id: UUID) -> None:
        """The command of this decision is in the log: it is not sent again before it can have been folded."""
        self._undone[decision_id] = self._clock() + RESEND_AFTER_S

    def given_up(self, decision_id: UUID) -> None:
        """No command can be made for this decision, now or later."""
        self._undone[decision_id] = math.inf
