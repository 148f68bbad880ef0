"""A decoded event with its position in the log, as projectors get it."""

from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple

from esper.oona.records import Position
from esper.schemas.events import Event, TrainerEvent
from esper.schemas.messages import OonaMessage
from esper.streams.projectors.health_report_decoder import HealthReport


class ProjectedEvent(NamedTuple):
    """One decoded record.

    Attributes:
        logged_ms: the broker's timestamp, in milliseconds since 1970.
        origin: the position before the record was redriven; None for most.
        message: None for a health report: no row needs the envelope, and there are too many to build it.
        late_from: 0 for an event in order. For a trainer's event that arrived after later ones, the next sequence:
            the event counts only at boundaries that name this sequence or a later one.
    """

    data: Event | HealthReport
    event_id: str
    position: Position
    logged_ms: int
    origin: Position | None = None
    message: OonaMessage | None = None
    late_from: int = 0

    @property
    def is_trainers(self) -> bool:
        """Whether the event has a trainer's sequence number."""
        return _is_trainers(type(self.data))

    @classmethod
    def of(
        cls, message: OonaMessage, position: Position, *, logged_ms: int = 0, origin: Position | None = None
    ) -> "ProjectedEvent":
        """An event from the message that was read at ``position``."""
        return cls(message.data, str(message.id), position, logged_ms, origin, message)

    @property
    def columns(self) -> dict[str, Any]:
        """The fields of the event and its envelope, by column name."""
        message = self.message
        assert message is not None, "a health report has no columns"
        event = message.data
        fields = {name: getattr(event, name) for name in type(event).model_fields}
        if isinstance(event, TrainerEvent):
            fields["seen_from"] = max(event.sequence, self.late_from)
        return {
            **fields,
            "event_id": message.id,
            "causation_id": message.causation_id,
            "traceparent": message.traceparent,
            "at": message.time,
            "log_partition": self.position.partition,
            "log_offset": self.position.offset,
            "logged_at": datetime.fromtimestamp(self.logged_ms / 1000, UTC),
        }


@cache
def _is_trainers(kind: type) -> bool:
    return issubclass(kind, TrainerEvent | HealthReport)
