"""Commands on their way into the model: received, checked, applied once.

Pure but for the lock: the link's thread puts commands in, the trainer's takes them out at a boundary.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from esper.kasmina.kernels import LoadedKernel
from esper.schemas.enums import RejectionReason
from esper.schemas.events import SeedCommand
from esper.schemas.messages import OonaMessage


@dataclass(frozen=True, slots=True)
class ReceivedCommand:
    """A command with its kernel, or with what was wrong with the kernel.

    ``at_step`` is set for a command that an earlier incarnation applied at that step: it is
    applied there again.
    """

    message: OonaMessage
    command: SeedCommand
    offset: int
    kernel: LoadedKernel | None = None
    problem: tuple[RejectionReason, str] | None = None
    at_step: int | None = None


def reason_to_reject(received: ReceivedCommand, incarnation: int, step: int) -> tuple[RejectionReason, str] | None:
    """Why a command cannot be carried out now, or None; the seed's own state is not looked at."""
    command = received.command
    if received.at_step is None and command.incarnation != incarnation:
        detail = f"for incarnation {command.incarnation}, this is {incarnation}"
        return RejectionReason.STALE_INCARNATION, detail
    if received.at_step is None and step > command.expires_at_step:
        return RejectionReason.EXPIRED, f"expired at step {command.expires_at_step}, this is {step}"
    return received.problem


class CommandInbox:
    """Commands that wait for a boundary. ``applied`` are the ids of all that were dealt with."""

    def __init__(self, offset: int, applied: Iterable[UUID] = ()) -> None:
        self._lock = threading.Lock()
        self._waiting: list[ReceivedCommand] = []
        self._applied = set(applied)
        self._next_offset = offset

    def put(self, received: ReceivedCommand) -> None:
        """Add a command, unless it was dealt with or waits already."""
        with self._lock:
            known = {r.message.id for r in self._waiting} | self._applied
            if received.message.id not in known:
                self._waiting.append(received)

    def passed(self, next_offset: int) -> None:
        """Note that all commands below ``next_offset`` were read."""
        with self._lock:
            self._next_offset = max(self._next_offset, next_offset)

    @property
    def next_offset(self) -> int:
        """The offset below which all commands were read."""
        with self._lock:
            return self._next_offset

    def ready(self, step: int) -> list[ReceivedCommand]:
        """The commands to deal with at this step, in the order of the log; they stay until ``done``."""
        with self._lock:
            return [r for r in self._waiting if r.at_step is None or r.at_step <= step]

    def done(self, received: ReceivedCommand) -> None:
        """A command was applied or rejected: never again."""
        with self._lock:
            self._waiting.remove(received)
            self._applied.add(received.message.id)

    def has_seen(self, wanted: Iterable[UUID]) -> bool:
        """Whether all these commands wait here or were dealt with."""
        with self._lock:
            known = {r.message.id for r in self._waiting} | self._applied
        return set(wanted) <= known

    def checkpoint(self) -> tuple[int, list[str]]:
        """The offset from which a resumed process must read, and the ids that it must skip."""
        with self._lock:
            offset = min((r.offset for r in self._waiting), default=self._next_offset)
            return offset, sorted(str(i) for i in self._applied)
