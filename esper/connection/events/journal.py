"""Journal: numbers a trainer's events, wraps them in envelopes and writes them to the outbox."""

from typing import Any, NamedTuple
from uuid import UUID

from esper.errors import OutboxFullError
from esper.oona.cloudevents import encode
from esper.oona.outbox.outbox_store import Outbox
from esper.schemas import ids
from esper.schemas.events import TrainerEvent
from esper.schemas.messages import OonaMessage


class Cause(NamedTuple):
    """The id and the trace of an event that caused another one."""

    id: UUID
    traceparent: str | None


class Journal:
    """Numbers and records the events of one incarnation.

    Invariant: a sequence number is used only by an event that is on disk (or, for telemetry, queued), and
    ``last_sequences`` has the last one of each topic.
    """

    def __init__(self, run_id: str, incarnation: int, outbox: Outbox) -> None:
        self.run_id = run_id
        self.incarnation = incarnation
        self.last_sequences: dict[str, int] = {}
        self._outbox = outbox
        self._next_sequence = 0
        self._metadata: dict[str, str] = {}

    def make(
        self, model: type[TrainerEvent], cause: OonaMessage | Cause | None = None, /, **fields: Any
    ) -> OonaMessage:
        """Create the next event in its envelope. Its sequence number is used once ``note`` is called."""
        event = model(run_id=self.run_id, incarnation=self.incarnation, sequence=self._next_sequence, **fields)
        return OonaMessage.of(
            event,
            id=ids.trainer_event_id(self.run_id, self.incarnation, self._next_sequence),
            source=f"tolaria/{self.run_id}",
            causation_id=cause.id if cause else None,
            traceparent=cause.traceparent if cause else None,
        )

    def note(self, message: OonaMessage) -> None:
        """Note that an event is on disk or queued: its sequence number is used."""
        self.last_sequences[message.registration.topic.name] = self._next_sequence
        self._next_sequence += 1

    def record(
        self, model: type[TrainerEvent], cause: OonaMessage | Cause | None = None, /, **fields: Any
    ) -> OonaMessage:
        """Write the next event to the outbox; it is on disk when this returns.

        Raises:
            OutboxFullError: the disk is full; nothing was written, and no sequence number was used.
        """
        message = self.make(model, cause, **fields)
        self._outbox.append([encode(message)], self._metadata)
        self._metadata = {}
        self.note(message)
        return message

    def set_metadata(self, name: str, value: str) -> None:
        """Store a small text in the outbox, in the transaction of the next event that is recorded."""
        self._metadata[name] = value

    def try_record(
        self, model: type[TrainerEvent], cause: OonaMessage | Cause | None = None, /, **fields: Any
    ) -> OonaMessage | None:
        """As ``record``, but returns None where the disk is full."""
        try:
            return self.record(model, cause, **fields)
        except OutboxFullError:
            return None
