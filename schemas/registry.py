"""The one registry: event type -> model -> topic -> key.

Oona, the projections, the published schemas and the tests all read it; nothing else
knows which topic an event belongs to. It holds the newest version of each type; an older
one is found under its own name, and read through its upcasters.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esper.schemas import events, topics
from esper.schemas.events import Event
from esper.schemas.topics import TopicSpec
from esper.schemas.upcasters import EVENT_TYPE, UPCASTERS, Upcaster, versions_from

EventClass = type[Event]


class UnknownEventType(ValueError):
    """No version of this type was ever in the registry: the record cannot be decoded."""


class NewerEventVersion(ValueError):
    """A newer version of a type that is known here: this reader must be upgraded, nothing skipped."""


@dataclass(frozen=True, slots=True)
class Registration:
    """One event type: ``key_field`` names the field whose value is the record's key."""

    type: str
    model: EventClass
    topic: TopicSpec
    key_field: str

    def key_of(self, event: Event) -> str:
        """The record key of an event: all events of one key are in one partition, in order."""
        return str(getattr(event, self.key_field))


_BY_TOPIC: Mapping[TopicSpec, tuple[str, tuple[EventClass, ...]]] = {
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
    topics.LIFECYCLE: ("run_id", (events.SeedTransitioned, events.CommandRejected, events.BreakerChanged)),
    topics.FIELD_REPORTS: ("run_id", (events.FieldReported,)),
    topics.BLUEPRINTS: (
        "blueprint_id",
        (events.BlueprintChangeRequested, events.CertificateIssued, events.KernelRegistered, events.KernelRefused),
    ),
    topics.POLICIES: (
        "policy_id",
        (events.PolicyTrained, events.PolicyEvaluated, events.PolicyActivated, events.PolicyRolledBack),
    ),
    topics.REDRIVES: ("topic", (events.DeadLetterRedriven,)),
}


def _type_of(model: EventClass) -> str:
    return str(model.model_fields["type"].default)


class Registry(Mapping[str, Registration]):
    """The newest version of every type, by type, and the upcasters that lead to them.

    Raises:
        ValueError: an upcaster leads to no registered type: records would be unreadable.
    """

    def __init__(self, entries: Iterable[Registration], upcasters: Mapping[str, Upcaster]) -> None:
        self._entries = MappingProxyType({entry.type: entry for entry in entries})
        self.upcasters = MappingProxyType(dict(upcasters))
        self._newest = {m["name"]: int(m["version"]) for m in map(EVENT_TYPE.fullmatch, self._entries) if m}
        self._old = {old: self._end_of(old) for old in self.upcasters}

    def __getitem__(self, event_type: str) -> Registration:
        return self._entries[event_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, event_type: str) -> Registration:
        """The registration that an event of this type is read by: that of its newest version.

        Raises:
            NewerEventVersion: the type is known, this version is not yet.
            UnknownEventType: anything else.
        """
        found = self._entries.get(event_type) or self._old.get(event_type)
        if found is not None:
            return found
        match = EVENT_TYPE.fullmatch(event_type)
        newest = self._newest.get(match["name"]) if match else None
        if match and newest is not None and int(match["version"]) > newest:
            raise NewerEventVersion(
                f"{event_type} is newer than v{newest}, which is what this program reads: upgrade it"
            )
        raise UnknownEventType(f"{event_type!r:.80} is not an event type of Esper")

    def _end_of(self, old: str) -> Registration:
        *_before, last = versions_from(old, self.upcasters)
        if last not in self._entries:
            raise ValueError(f"the upcaster of {old} leads to {last}, which no model is registered for")
        return self._entries[last]


REGISTRY = Registry(
    (
        Registration(_type_of(model), model, topic, key_field)
        for topic, (key_field, models) in _BY_TOPIC.items()
        for model in models
    ),
    UPCASTERS,
)


def registration(event_type: str) -> Registration:
    """Look an event type up.

    Raises:
        NewerEventVersion, UnknownEventType: as ``Registry.find``.
    """
    return REGISTRY.find(event_type)


def types_on(topic: TopicSpec) -> tuple[Registration, ...]:
    """All event types that may be on a topic."""
    return tuple(r for r in REGISTRY.values() if r.topic == topic)
