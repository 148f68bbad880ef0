"""The one registry: event type -> model -> topic -> key.

Oona, the projections, the published schemas and the tests all read it; nothing else
knows which topic an event belongs to.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esper.schemas import events, topics
from esper.schemas.events import Event
from esper.schemas.topics import TopicSpec

EVENT_TYPE = re.compile(r"^(?P<name>esper(?:\.[a-z0-9-]+){2})\.v(?P<version>[1-9][0-9]*)$")


EventClass = type[Event]


class UnknownEventType(ValueError):
    """No version of this type was ever in the registry: the record cannot be decoded."""


class NewerEventVersion(ValueError):
    """A newer version of a type that is known here: this reader must be upgraded, nothing skipped."""


@dataclass(frozen=True, slots=True)
class Registration:
    """One event type: ``key_field`` names the field whose value is the record's key."""

    type: str
    model: "EventClass"
    topic: TopicSpec
    key_field: str

    def key_of(self, event: Event) -> str:
        """The record key of an event: all events of one key are in one partition, in order."""
        return str(getattr(event, self.key_field))


_BY_TOPIC: Mapping[TopicSpec, tuple[str, tuple[type[Event], ...]]] = {
    topics.TELEMETRY: ("run_id", (events.LayerHealthMeasured,)),
    topics.RUNS: (
        "run_id",
        (
            events.RunStarted,
            events.RunResumed,
            events.BoundaryReached,
            events.EpochCompleted,
            events.CheckpointSaved,
            events.TelemetryGap,
            events.RunEnded,
        ),
    ),
    topics.VIEWS: ("run_id", (events.ViewRecorded,)),
    topics.DECISIONS: ("run_id", (events.DecisionMade,)),
    topics.COMMANDS: ("run_id", (events.GerminateSeed, events.CullSeed, events.FossilizeSeed)),
    topics.LIFECYCLE: ("run_id", (events.SeedTransitioned, events.CommandRejected)),
    topics.FIELD_REPORTS: ("run_id", (events.FieldReported,)),
    topics.BLUEPRINTS: ("blueprint_id", (events.BlueprintChangeRequested, events.KernelRegistered)),
    topics.POLICIES: ("policy_id", (events.PolicyActivated,)),
    topics.REDRIVES: ("topic", (events.DeadLetterRedriven,)),
}


def _type_of(model: type[Event]) -> str:
    return str(model.model_fields["type"].default)


REGISTRY: Mapping[str, Registration] = MappingProxyType(
    {
        _type_of(model): Registration(_type_of(model), model, topic, key_field)
        for topic, (key_field, models) in _BY_TOPIC.items()
        for model in models
    }
)

_LATEST: Mapping[str, int] = MappingProxyType(
    {m["name"]: int(m["version"]) for m in map(EVENT_TYPE.match, REGISTRY) if m is not None}
)


def registration(event_type: str) -> Registration:
    """Look an event type up.

    Raises:
        NewerEventVersion: the type is known, this version is not yet.
        UnknownEventType: anything else.
    """
    found = REGISTRY.get(event_type)
    if found is not None:
        return found
    match = EVENT_TYPE.match(event_type)
    latest = _LATEST.get(match["name"]) if match else None
    if match and latest is not None and int(match["version"]) > latest:
        raise NewerEventVersion(f"{event_type} is newer than v{latest}, which is what this program reads: upgrade it")
    raise UnknownEventType(f"{event_type!r} is not an event type of Esper")


def types_on(topic: TopicSpec) -> tuple[Registration, ...]:
    """All event types that may be on a topic."""
    return tuple(r for r in REGISTRY.values() if r.topic == topic)
