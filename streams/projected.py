"""An event on its way into a row: what was in the record, and where it was read."""

from typing import Any, NamedTuple

from esper.oona.records import Position
from esper.schemas.events import Event
from esper.schemas.messages import OonaMessage
from esper.streams.health_reports import HealthReport


class Projected(NamedTuple):
    """One decoded record. ``origin`` is where it lay before it was redriven, None for most.

    ``message`` is None for a health report: those come by the hundred thousand, and no row has their envelope.
    ``logged_ms`` is when the broker took it, in milliseconds since 1970.
    """

    data: Event | HealthReport
    event_id: str
    position: Position
    logged_ms: int
    origin: Position | None = None
    message: OonaMessage | None = None

    @classmethod
    def of(
        cls, message: OonaMessage, position: Position, *, logged_ms: int = 0, origin: Position | None = None
    ) -> "Projected":
        """A message as it was read at ``position``."""
        return cls(message.data, str(message.id), position, logged_ms, origin, message)

    @property
    def columns(self) -> dict[str, Any]:
        """The event's scalar fields and its envelope, by the names of the columns."""
        message = self.message
        assert message is not None, "a health report has no columns of its own"
        event = message.data
        fields = {name: getattr(event, name) for name in type(event).model_fields}
        return {
            **fields,
            "event_id": message.id,
            "causation_id": message.causation_id,
            "traceparent": message.traceparent,
            "at": message.time,
            "log_partition": self.position.partition,
            "log_offset": self.position.offset,
        }
