"""The registry of event types: type -> model, topic and record key.

It alone maps an event to its topic; Oona, the projections, the published schemas and the tests read it. It holds the
newest version of each type. An older version is found by its type and read through its upcasters.
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
    """No version of this type was ever registered: the record cannot be decoded."""


class NewerEventVersion(ValueError):
    """A newer version of a registered type: the reader must stop and be upgraded, never skip the record."""


@dataclass(frozen=True, slots=True)
class Registration:
    """One event type. ``key_field`` names the field whose value is the record's key."""

    type: str
    model: EventClass
    topic: TopicSpec
    key_field: str

    def key_of(self, event: Event) -> str:
        """The record key of an event. All events of one key are in one partition, in order."""
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
        ValueError: an upcaster leads to a type without a model; its records would be unreadable.
    """

    def __init__(self, entries: Iterable[Registration], upcasters: Mapping[str, Upcaster]) -> None:
        self._entries = MappingProxyType({entry.type: entry for entry in entries})
        self.upcasters = MappingProxyType(dict(upcasters))
        self._newest = {m["name"]: int(m["version"]) for m in map(EVENT_TYPE.fullmatch, self._entries) if m}
        self._older = {old: self._newest_registration(old) for old in self.upcasters}

    def __getitem__(self, event_type: str) -> Registration:
        return self._entries[event_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, event_type: str) -> Registration:
        """The registration that reads an event of this type: that of its newest version.

        Raises:
            NewerEventVersion: the type is registered, but only in older versions.
            UnknownEventType: no version of the type is registered.
        """
        found = self._entries.get(event_type) or self._older.get(event_type)
        if found is not None:
            return found
        match = EVENT_TYPE.fullmatch(event_type)
        newest = self._newest.get(match["name"]) if match else None
        if match and newest is not None and int(match["version"]) > newest:
            raise NewerEventVersion(
                f"{event_type} is newer than v{newest}, the newest version that this program reads; upgrade it"
            )
        raise UnknownEventType(f"{event_type!r:.80} is not an event type of Esper")

    def _newest_registration(self, old: str) -> Registration:
        *_before, last = versions_from(old, self.upcasters)
        if last not in self._entries:
            raise ValueError(
                f"the upcaster of {old} leads to {last}, which has no model; register one in schemas/registry.py"
            )
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
    """Look up an event type.

    Raises:
        NewerEventVersion, UnknownEventType: as ``Registry.find``.
    """
    return REGISTRY.find(event_type)
