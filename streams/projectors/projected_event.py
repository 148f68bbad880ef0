"""An event on its way into a row: what was in the record, and where it was read."""

from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple

from esper.oona.records import Position
from esper.schemas.events import Event, TrainerEvent
from esper.schemas.messages import OonaMessage
from esper.streams.projectors.health_report_decoder import HealthReport


class ProjectedEvent(NamedTuple):
    """One decoded record. ``origin`` is where it lay before it was redriven, None for most.

    ``message`` is None for a health report: those come by the hundred thousand, and no row has their envelope.
    ``logged_ms`` is when the broker took it, in milliseconds since 1970. ``late_from`` is 0 for what came in
    order; of a trainer's event that came after later ones, it is the sequence of the next one: only boundaries that
    name that or a later one are shown what it says.
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
        """Whether a trainer's sequence numbers it."""
        return _is_trainers(type(self.data))

    @classmethod
    def of(
        cls, message: OonaMessage, position: Position, *, logged_ms: int = 0, origin: Position | None = None
    ) -> "ProjectedEvent":
        """A message as it was read at ``position``."""
        return cls(message.data, str(message.id), position, logged_ms, origin, message)

    @property
    def columns(self) -> dict[str, Any]:
        """The event's scalar fields and its envelope, by the names of the columns."""
        message = self.message
        assert message is not None, "a health report has no columns of its own"
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
