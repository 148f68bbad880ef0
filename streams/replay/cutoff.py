"""The cutoff of a replay: offsets, a time, or both.

"As of time T" means, in each partition, the records before the first one with a broker timestamp of T or later. Esper's
topics use the broker's clock, so with one broker a cutoff never has an event without its cause; with several brokers
this holds as far as their clocks agree.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from esper.errors import ConfigError
from esper.oona.records import TopicPartition
from esper.schemas.topics import TOPICS
from esper.streams.replay.replay_log_reader import LogReader, Offsets

_OFFSET = re.compile(r"(?P<topic>[^\[\]@]+)\[(?P<partition>[0-9]{1,9})\]@(?P<offset>[0-9]{1,18})")
FORMS = "write TOPIC[PARTITION]@OFFSET, e.g. system.runs[3]@120, or a time with its zone, e.g. 2026-11-25T20:15:00Z"


@dataclass(frozen=True, slots=True)
class Cutoff:
    """``at`` applies to every partition without an entry in ``offsets``; None means the end of the log."""

    at: datetime | None = None
    offsets: Mapping[TopicPartition, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str], option: str = "--until") -> "Cutoff":
        """Parse the values of a command-line option.

        Raises:
            ConfigError: a value is neither an offset nor a time, names an unknown partition, or is a second time.
        """
        at: datetime | None = None
        offsets: dict[TopicPartition, int] = {}
        for text in texts:
            if (found := _OFFSET.fullmatch(text)) is not None:
                offsets[_partition(found["topic"], int(found["partition"]), text, option)] = int(found["offset"])
            elif at is not None:
                raise ConfigError(f"{option} has two times, {at.isoformat()} and {text}; give one")
            else:
                at = _time(text, option)
        return cls(at, offsets)

    def __str__(self) -> str:
        at = [self.at.isoformat()] if self.at is not None else []
        return ", ".join([*at, *(f"{topic}[{n}]@{offset}" for (topic, n), offset in sorted(self.offsets.items()))])

    async def ends(self, reader: LogReader) -> Offsets:
        """The offset to stop before, for every partition of the reader except dead-letter topics.

        Raises:
            ConfigError: an offset lies outside the log.
        """
        first, last = await reader.first_offsets(), await reader.end_offsets()
        found = await reader.offsets_at(self.at) if self.at is not None else last
        for (topic, n), offset in self.offsets.items():
            if (topic, n) not in first:
                raise ConfigError(f"--until {topic}[{n}]@{offset}: this command does not read that topic; remove it")
            if not first[topic, n] <= offset <= last[topic, n]:
                raise ConfigError(
                    f"--until {topic}[{n}]@{offset}: outside the log; give an offset from {first[topic, n]} to "
                    f"{last[topic, n]}"
                )
        return {
            tp: self.offsets.get(tp, max(found[tp], first[tp]))
            for topic in TOPICS
            if topic in reader.topics
            for tp in topic.partitions
        }


def _partition(topic: str, partition: int, text: str, option: str) -> TopicPartition:
    known = {t.name: t.num_partitions for t in TOPICS}
    if topic not in known:
        raise ConfigError(f"{option} {text}: unknown topic {topic!r}; choose one of {', '.join(known)}")
    if partition >= known[topic]:
        raise ConfigError(f"{option} {text}: no partition {partition}; {topic} has partitions 0 to {known[topic] - 1}")
    return topic, partition


def _time(text: str, option: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is neither an offset nor a time: {FORMS}") from None
    if at.tzinfo is None:
        raise ConfigError(f"{option} {text} has no time zone: write {text}Z for UTC, or {text}+02:00")
    if at > datetime.now(UTC):
        raise ConfigError(f"{option} {text} is in the future; give a past time")
    return at
