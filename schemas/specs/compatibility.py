"""What a change of the contracts breaks, for whom, and why: the models against the released set.

Consumers refuse what they do not know, and the log is kept for ever. So a released type never changes
shape, in either direction: a narrower one cannot read the log, a wider one cannot be read by those who have
not upgraded. What has to change becomes the next version, with an upcaster.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from esper.schemas.specs.contract_set import ContractSet, TopicContract, TypeContract
from esper.schemas.specs.schema_comparison import Change, compare
from esper.schemas.upcasters import EVENT_TYPE, Upcaster, next_version, versions_from


class AffectedParty(StrEnum):
    """Whom a change breaks."""

    LOG_READERS = "readers of the log, once upgraded"
    OLD_CONSUMERS = "consumers not upgraded yet"
    ALL_CLIENTS = "everybody who reads or writes the topic"
    REBUILDS = "rebuilds and retraining"
    NONE = "nobody"


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference: where, what, who breaks, why, and what to do instead."""

    subject: str
    path: str
    what: str
    affected: AffectedParty
    why: str
    remedy: str

    @property
    def is_break(self) -> bool:
        """Whether the contracts cannot be released like this."""
        return self.affected is not AffectedParty.NONE


def check(released: ContractSet, current: ContractSet, upcasters: Mapping[str, Upcaster]) -> list[Finding]:
    """Every difference between what others rely on and what the models are now; breaks first."""
    found = [*_types(released, current, upcasters), *_topics(released, current)]
    return sorted(found, key=lambda f: not f.is_break)


def _types(released: ContractSet, current: ContractSet, upcasters: Mapping[str, Upcaster]) -> Iterator[Finding]:
    for name, old in released.types.items():
        *_before, newest = versions_from(name, upcasters)
        new = current.types.get(newest)
        if new is None:
            yield Finding(
                name, "", "the type was removed", AffectedParty.LOG_READERS,
                "its records are in the log for ever, and would be dead-lettered as unknown",
                f"keep its model, or read it as {next_version(name)} through an upcaster in schemas/upcasters.py",
            )  # fmt: skip
            continue
        yield from _place(name, old, new)
        if newest == name:
            for change in compare(old.schema, new.schema):
                yield from _shape(name, change)
    for name in sorted(current.types.keys() - released.types.keys()):
        yield _new_type(name, released)


def _shape(name: str, change: Change) -> Iterator[Finding]:
    remedy = f"leave {name} as it was; put the change into {next_version(name)}, with an upcaster from {name}"
    if change.narrower:
        yield Finding(
            name, change.path, change.what, AffectedParty.LOG_READERS,
            "records that are in the log already need not fit: a rebuild or replay would dead-letter them", remedy,
        )  # fmt: skip
    if change.wider:
        yield Finding(
            name, change.path, change.what, AffectedParty.OLD_CONSUMERS,
            "they refuse what they do not know: they would dead-letter new records", remedy,
        )  # fmt: skip


def _place(name: str, old: TypeContract, new: TypeContract) -> Iterator[Finding]:
    if old.topic != new.topic:
        yield Finding(
            name, "topic", f"{old.topic} became {new.topic}", AffectedParty.ALL_CLIENTS,
            "a type on another topic is refused: upgraded readers refuse the old records, the others the new ones",
            "leave it on its topic; for another topic make another type",
        )  # fmt: skip
    if old.key_field != new.key_field:
        yield Finding(
            name, "key", f"{old.key_field} became {new.key_field}", AffectedParty.ALL_CLIENTS,
            "events that belong together would lie in two partitions, before and after, and lose their order",
            "leave the key as it is; for another key make another type on another topic",
        )  # fmt: skip


def _new_type(name: str, released: ContractSet) -> Finding:
    match = EVENT_TYPE.fullmatch(name)
    earlier = match and any(t.startswith(f"{match['name']}.v") for t in released.types)
    why = (
        "consumers that are not upgraded stop at it, show it red, and lose nothing"
        if earlier
        else "consumers that are not upgraded would dead-letter it as unknown"
    )
    what = "a new version" if earlier else "a new type"
    return Finding(name, "", what, AffectedParty.NONE, why, "upgrade consumers before producers")


def _topics(released: ContractSet, current: ContractSet) -> Iterator[Finding]:
    for name, old in released.topics.items():
        new = current.topics.get(name)
        if new is None:
            yield Finding(
                name, "", "the topic was removed", AffectedParty.ALL_CLIENTS,
                "its records would be read by nobody, and rebuilt tables would lack them", "keep the topic",
            )  # fmt: skip
        else:
            yield from _topic(name, old, new)
    for name in sorted(current.topics.keys() - released.topics.keys()):
        remedy = "run `esper topics apply` before anything that uses it starts"
        yield Finding(
            name, "", "a new topic", AffectedParty.NONE, "a worker refuses to start while it is missing", remedy
        )


def _topic(name: str, old: TopicContract, new: TopicContract) -> Iterator[Finding]:
    if old.num_partitions != new.num_partitions:
        yield Finding(
            name, "partitions", f"{old.num_partitions} became {new.num_partitions}", AffectedParty.ALL_CLIENTS,
            "a key would move to another partition: order and stored positions are by partition",
            "leave the count as it is; for another count make another topic",
        )  # fmt: skip
    if old.retention_ms != new.retention_ms:
        is_shorter = old.retention_ms < 0 or 0 <= new.retention_ms < old.retention_ms
        yield Finding(
            name, "retention", f"{_kept(old)} became {_kept(new)}", AffectedParty.REBUILDS if is_shorter else AffectedParty.NONE,
            "records they read would be gone" if is_shorter else "nothing is lost, the log takes more room",
            "keep records at least as long" if is_shorter else "mind the disk",
        )  # fmt: skip


def _kept(topic: TopicContract) -> str:
    return "for ever" if topic.retention_ms < 0 else f"{topic.retention_ms:,} ms"
