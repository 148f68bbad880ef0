"""The boundaries that wait for a decision, and the decisions that wait for a command.

Does no I/O. Invariant: a boundary is held back for at most ``stale_after_s``, whatever is wrong with it. Its state is
dropped once the projections no longer show it as undecided.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from esper.retry import Backoff
from esper.streams.read_models.pending_boundaries import PendingBoundary, UncommandedDecision

RETRY_S = (0.2, 2.0)  # first and longest wait before the view of a boundary is read again after a failure
RESEND_AFTER_S = 2.0  # time for a command to be projected before it is sent again; shorter sends duplicates
GRACE_S = 0.3  # time for the controller that made a decision to send its command


@dataclass(slots=True)
class _State:
    first_seen_at: float
    retry_at: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(*RETRY_S))
    is_decided: bool = False


@dataclass(frozen=True, slots=True)
class ReadyBoundaries:
    """Boundaries to decide now: those with a complete view, and those that waited too long for one."""

    complete: list[PendingBoundary] = field(default_factory=list)
    stale: list[PendingBoundary] = field(default_factory=list)


class PendingBoundaryQueue:
    """The state that one controller keeps of undecided boundaries and of commands that it sent."""

    def __init__(self, stale_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_after_s, self._clock = stale_after_s, clock
        self._states: dict[UUID, _State] = {}
        self._command_due_at: dict[UUID, float] = {}

    def update(self, pending: Sequence[PendingBoundary]) -> list[PendingBoundary]:
        """Take what the projections show as undecided; return the boundaries without a decision of this controller."""
        now = self._clock()
        self._states = {p.event_id: self._states.get(p.event_id) or _State(now) for p in pending}
        return [p for p in pending if not self._states[p.event_id].is_decided]

    def ready(self, undecided: Iterable[PendingBoundary]) -> ReadyBoundaries:
        """Return the boundaries that can be decided now, in the order in which they were first seen."""
        now, ready = self._clock(), ReadyBoundaries()
        for boundary in sorted(undecided, key=lambda p: self._states[p.event_id].first_seen_at):
            state = self._states[boundary.event_id]
            if boundary.is_complete and state.retry_at <= now:
                ready.complete.append(boundary)
            elif not boundary.is_complete and now - state.first_seen_at >= self._stale_after_s:
                ready.stale.append(boundary)
        return ready

    def view_failed(self, boundary: PendingBoundary) -> bool:
        """Schedule another attempt for a boundary whose view cannot be made; True if it has waited long enough."""
        state, now = self._states[boundary.event_id], self._clock()
        if now - state.first_seen_at >= self._stale_after_s:
            return True
        state.retry_at = min(now + state.backoff.next_s(), state.first_seen_at + self._stale_after_s)
        return False

    def mark_decided(self, boundary: PendingBoundary) -> float:
        """Note that the decision is in the log; return how long the boundary waited here, in seconds."""
        state = self._states[boundary.event_id]
        state.is_decided = True
        return self._clock() - state.first_seen_at

    def due_commands(self, uncommanded: Sequence[UncommandedDecision]) -> list[UncommandedDecision]:
        """Take the decisions that have no command in the projections; return those whose command is to be sent now."""
        now = self._clock()
        in_flight = {event_id: at for event_id, at in self._command_due_at.items() if now < at < math.inf}
        self._command_due_at = in_flight | {
            d.event_id: self._command_due_at.get(d.event_id, now + GRACE_S) for d in uncommanded
        }
        return [d for d in uncommanded if self._command_due_at[d.event_id] <= now]

    def mark_commanded(self, decision_id: UUID) -> None:
        """Note that the command is in the log: it is not sent again until the projections had time to show it."""
        self._command_due_at[decision_id] = self._clock() + RESEND_AFTER_S

    def abandon_command(self, decision_id: UUID) -> None:
        """Note that no command can ever be made for this decision."""
        self._command_due_at[decision_id] = math.inf
