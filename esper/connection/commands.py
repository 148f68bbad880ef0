"""Commands between their receipt and the boundary that applies them. Invariant: a command is handled once.

Does no I/O: the connection thread adds commands, the training thread takes them at a boundary.
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
    """A command with its kernel, or with the reason why the kernel is unusable."""

    message: OonaMessage
    command: SeedCommand
    offset: int
    kernel: LoadedKernel | None = None  # for a command that germinates a seed
    problem: tuple[RejectionReason, str] | None = None  # the reason to reject the command, and its detail
    at_step: int | None = None  # an earlier incarnation applied the command at this step: it is applied there again


def rejection_reason(received: ReceivedCommand, incarnation: int, step: int) -> tuple[RejectionReason, str] | None:
    """Why a command cannot be applied at this step, regardless of its seed's stage; None if it can."""
    command = received.command
    if received.at_step is None and command.incarnation != incarnation:
        detail = f"for incarnation {command.incarnation}, this is incarnation {incarnation}"
        return RejectionReason.STALE_INCARNATION, detail
    if received.at_step is None and step > command.expires_at_step:
        return RejectionReason.EXPIRED, f"expired at step {command.expires_at_step}, this is step {step}"
    return received.problem


class CommandInbox:
    """Commands that wait for a boundary. Thread-safe.

    Args:
        offset: the offset of the first command to read.
        handled: ids of the commands that earlier incarnations applied or rejected.
    """

    def __init__(self, offset: int, handled: Iterable[UUID] = ()) -> None:
        self._lock = threading.Lock()
        self._waiting: list[ReceivedCommand] = []
        self._handled = set(handled)
        self._next_offset = offset

    def put(self, received: ReceivedCommand) -> None:
        """Add a command, unless it was handled or waits already."""
        with self._lock:
            known = {r.message.id for r in self._waiting} | self._handled
            if received.message.id not in known:
                self._waiting.append(received)

    def advance(self, next_offset: int) -> None:
        """Note that every command below ``next_offset`` was read."""
        with self._lock:
            self._next_offset = max(self._next_offset, next_offset)

    @property
    def next_offset(self) -> int:
        """The offset of the next command to read."""
        with self._lock:
            return self._next_offset

    def ready(self, step: int) -> list[ReceivedCommand]:
        """The commands to handle at this step, in the order of the log; each stays until ``done``."""
        with self._lock:
            return [r for r in self._waiting if r.at_step is None or r.at_step <= step]

    def done(self, received: ReceivedCommand) -> None:
        """Note that a command was applied or rejected; it is never returned again."""
        with self._lock:
            self._waiting.remove(received)
            self._handled.add(received.message.id)

    def has_seen(self, wanted: Iterable[UUID]) -> bool:
        """Whether every one of these commands waits or was handled."""
        with self._lock:
            known = {r.message.id for r in self._waiting} | self._handled
        return set(wanted) <= known

    def checkpoint(self) -> tuple[int, list[str]]:
        """The offset from which a resumed process reads, and the ids that it skips."""
        with self._lock:
            offset = min((r.offset for r in self._waiting), default=self._next_offset)
            return offset, sorted(str(i) for i in self._handled)
