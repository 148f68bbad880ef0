"""OonaMessage: the envelope of every event (CloudEvents 1.0 with Esper's extensions)."""

import secrets
from datetime import UTC, datetime
from typing import Annotated, Self
from uuid import UUID

from pydantic import AwareDatetime, Field, SerializeAsAny

from esper.schemas.base import FrozenContract, Name, Text
from esper.schemas.events import Event
from esper.schemas.registry import Registration, registration
from esper.schemas.specs.json_schema import schema_id

TRACEPARENT_PATTERN = r"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"


class OonaMessage(FrozenContract):
    """One event in its envelope.

    ``correlation_id`` is the record key: the run, blueprint, policy or topic. ``causation_id`` is the id of the event
    that caused this one; followed backwards, it explains why this event happened.
    """

    id: UUID
    source: Name
    time: AwareDatetime
    data: SerializeAsAny[Event]
    correlation_id: Annotated[Text, Field(min_length=1)]
    causation_id: UUID | None = None
    traceparent: Annotated[str, Field(pattern=TRACEPARENT_PATTERN)] | None = None

    @property
    def registration(self) -> Registration:
        """The registration of the event's type: model, topic and key."""
        return registration(self.data.type)

    @property
    def data_schema(self) -> str:
        """The URI of the published JSON Schema of the value."""
        return schema_id(self.data.type)

    @classmethod
    def of(
        cls,
        event: Event,
        *,
        id: UUID,
        source: str,
        causation_id: UUID | None = None,
        traceparent: str | None = None,
        time: datetime | None = None,
    ) -> Self:
        """Wrap an event. It continues the trace of ``traceparent``, which is the cause's, or starts a new one."""
        return cls(
            id=id,
            source=source,
            time=time or datetime.now(UTC),
            data=event,
            correlation_id=registration(event.type).key_of(event),
            causation_id=causation_id,
            traceparent=child_traceparent(traceparent),
        )


def child_traceparent(traceparent: str | None) -> str:
    """A traceparent (W3C Trace Context, version 00): a new span in the trace of ``traceparent``, or in a new one."""
    trace_id = traceparent.split("-")[1] if traceparent else secrets.token_hex(16)
    return f"00-{trace_id}-{secrets.token_hex(8)}-01"
