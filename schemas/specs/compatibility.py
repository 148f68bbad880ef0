"""Finds breaking changes of the contracts: compares the models with the released set.

Consumers refuse unknown fields and types, and the log is kept forever. So a released type never changes its shape: a
narrower one cannot read the log, and consumers that are not upgraded cannot read a wider one. A necessary change
becomes the next version of the type, with an upcaster.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from esper.schemas.specs.contract_set import ContractSet, TopicContract, TypeContract
from esper.schemas.specs.schema_comparison import Change, compare
from esper.schemas.upcasters import EVENT_TYPE, Upcaster, next_version, versions_from


class Affected(StrEnum):
    """The programs that a change breaks."""

    LOG_READERS = "readers of the log, once upgraded"
    OLD_CONSUMERS = "consumers not upgraded yet"
    ALL_CLIENTS = "all readers and writers of the topic"
    REBUILDS = "rebuilds and retraining"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference: where, what, which programs it breaks, why, and the remedy."""

    subject: str
    path: str
    what: str
    affected: Affected
    why: str
    remedy: str

    @property
    def is_break(self) -> bool:
        """Whether the difference forbids a release."""
        return self.affected is not Affected.NONE


def check(released: ContractSet, current: ContractSet, upcasters: Mapping[str, Upcaster]) -> list[Finding]:
    """Every difference between the released contracts and the current ones, breaking changes first."""
    found = [*_type_findings(released, current, upcasters), *_topic_set_findings(released, current)]
    return sorted(found, key=lambda f: not f.is_break)


def _type_findings(released: ContractSet, current: ContractSet, upcasters: Mapping[str, Upcaster]) -> Iterator[Finding]:
    for name, old in released.types.items():
        *_before, newest = versions_from(name, upcasters)
        new = current.types.get(newest)
        if new is None:
            yield Finding(
                name, "", "the type was removed", Affected.LOG_READERS,
                "its records are in the log forever and would become dead letters of unknown type",
                f"keep its model, or read it as {next_version(name)} through an upcaster in schemas/upcasters.py",
            )  # fmt: skip
            continue
        yield from _routing_findings(name, old, new)
        if newest == name:
            for change in compare(old.schema, new.schema):
                yield from _shape_findings(name, change)
    for name in sorted(current.types.keys() - released.types.keys()):
        yield _new_type(name, released)


def _shape_findings(name: str, change: Change) -> Iterator[Finding]:
    remedy = f"leave {name} as it was; put the change into {next_version(name)}, with an upcaster from {name}"
    if change.narrower:
        yield Finding(
            name, change.path, change.what, Affected.LOG_READERS,
            "records in the log may not fit: a rebuild or replay would make dead letters of them", remedy,
        )  # fmt: skip
    if change.wider:
        yield Finding(
            name, change.path, change.what, Affected.OLD_CONSUMERS,
            "they refuse unknown values: they would make dead letters of new records", remedy,
        )  # fmt: skip


def _routing_findings(name: str, old: TypeContract, new: TypeContract) -> Iterator[Finding]:
    if old.topic != new.topic:
        yield Finding(
            name, "topic", f"{old.topic} became {new.topic}", Affected.ALL_CLIENTS,
            "readers refuse a type on another topic: upgraded ones the old records, the others the new ones",
            "leave it on its topic; for another topic add another type",
        )  # fmt: skip
    if old.key_field != new.key_field:
        yield Finding(
            name, "key", f"{old.key_field} became {new.key_field}", Affected.ALL_CLIENTS,
            "events of one key would be in two partitions, from before and after the change, and lose their order",
            "leave the key as it is; for another key add another type on another topic",
        )  # fmt: skip


def _new_type(name: str, released: ContractSet) -> Finding:
    match = EVENT_TYPE.fullmatch(name)
    earlier = match and any(t.startswith(f"{match['name']}.v") for t in released.types)
    why = (
        "consumers that are not upgraded stop their partition at it, report it, and lose nothing"
        if earlier
        else "consumers that are not upgraded would make dead letters of it as an unknown type"
    )
    what = "a new version" if earlier else "a new type"
    return Finding(name, "", what, Affected.NONE, why, "upgrade consumers before producers")


def _topic_set_findings(released: ContractSet, current: ContractSet) -> Iterator[Finding]:
    for name, old in released.topics.items():
        new = current.topics.get(name)
        if new is None:
            yield Finding(
                name, "", "the topic was removed", Affected.ALL_CLIENTS,
                "no program would read its records, and rebuilt tables would lack them", "keep the topic",
            )  # fmt: skip
        else:
            yield from _topic_findings(name, old, new)
    for name in sorted(current.topics.keys() - released.topics.keys()):
        remedy = "run `esper topics apply` before starting a program that uses it"
        yield Finding(name, "", "a new topic", Affected.NONE, "a worker does not start while it is missing", remedy)


def _topic_findings(name: str, old: TopicContract, new: TopicContract) -> Iterator[Finding]:
    if old.num_partitions != new.num_partitions:
        yield Finding(
            name, "partitions", f"{old.num_partitions} became {new.num_partitions}", Affected.ALL_CLIENTS,
            "a key would move to another partition: order and stored positions are by partition",
            "leave the count as it is; for another count add another topic",
        )  # fmt: skip
    if old.retention_ms != new.retention_ms:
        is_shorter = old.retention_ms < 0 or 0 <= new.retention_ms < old.retention_ms
        affected = Affected.REBUILDS if is_shorter else Affected.NONE
        yield Finding(
            name, "retention", f"{_retention_text(old)} became {_retention_text(new)}", affected,
            "records that they need would be deleted" if is_shorter else "nothing is lost; the log takes more space",
            "keep records at least as long" if is_shorter else "check that the disk is large enough",
        )  # fmt: skip


def _retention_text(topic: TopicContract) -> str:
    return "forever" if topic.retention_ms < 0 else f"{topic.retention_ms:,} ms"
