"""An event on its way into a row: the message, and where it was read."""

from dataclasses import dataclass
from typing import Any

from esper.oona.records import Position
from esper.schemas.messages import OonaMessage


@dataclass(frozen=True, slots=True)
class Projected:
    """One decoded record. ``origin`` is where it lay before it was redriven, None for most."""

    message: OonaMessage
    position: Position
    origin: Position | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The event's scalar fields and its envelope, by the names of the columns."""
        event = self.message.data
        fields = {name: getattr(event, name) for name in type(event).model_fields}
        return {
            **fields,
            "event_id": self.message.id,
            "causation_id": self.message.causation_id,
            "traceparent": self.message.traceparent,
            "at": self.message.time,
            "log_partition": self.position.partition,
            "log_offset": self.position.offset,
        }
