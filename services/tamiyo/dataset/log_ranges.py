"""The part of the log that a replay reads.

``--from`` selects decisions; their views and reports are read wherever they are. ``--until`` is the end of the log for
this replay, on all topics. So one range gives the same experiences, however the log grows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from esper.errors import ConfigError
from esper.oona.records import Position, TopicPartition
from esper.schemas.topics import DECISIONS, FIELD_REPORTS, LIFECYCLE, VIEWS
from esper.streams.replay import Cutoff
from esper.streams.replay.replay_log_reader import LogReader, Offsets

EARLIEST = "EARLIEST"
EXPERIENCE_TOPICS = (DECISIONS, VIEWS, FIELD_REPORTS, LIFECYCLE)


@dataclass(frozen=True, slots=True)
class ReplayRange:
    """A range as an operator gives it.

    Attributes:
        since: the first decisions; the start of the log if it names neither a time nor an offset.
        until: the end of the log.
        runs: patterns of run ids (``*``, ``?``, ``[...]``); all runs if empty.
    """

    since: Cutoff = field(default_factory=Cutoff)
    until: Cutoff = field(default_factory=Cutoff)
    runs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, since: Sequence[str], until: Sequence[str], runs: Sequence[str]) -> "ReplayRange":
        """Parse the options ``--from``, ``--until`` and ``--runs``.

        Raises:
            ConfigError: they are no range.
        """
        if EARLIEST in since and len(since) > 1:
            raise ConfigError(f"--from {EARLIEST} is the start of the log: omit the other --from options")
        begin = Cutoff() if list(since) == [EARLIEST] else Cutoff.parse(since, "--from")
        for topic, n in begin.offsets:
            if topic != DECISIONS.name:
                raise ConfigError(f"--from {topic}[{n}]@...: it selects decisions, use {DECISIONS.name}[{n}]@OFFSET")
        return cls(begin, Cutoff.parse(until), tuple(runs))

    def includes_run(self, run_id: str) -> bool:
        """Return whether a run matches a pattern."""
        return not self.runs or any(fnmatchcase(run_id, pattern) for pattern in self.runs)

    async def bounds(self, reader: LogReader) -> "OffsetBounds":
        """Return the range as offsets of the log as it is now.

        Raises:
            ConfigError: the log ends before the range.
        """
        first, last, ends = await reader.first_offsets(), await reader.end_offsets(), await self.until.ends(reader)
        begins = first if self.since.at is None else await reader.offsets_at(self.since.at)
        partitions = [(topic, n) for topic in EXPERIENCE_TOPICS for n in range(topic.num_partitions)]
        return OffsetBounds(
            lost=lost_offsets(first),
            begins={(DECISIONS.name, n): begins[DECISIONS.name, n] for n in range(DECISIONS.num_partitions)}
            | dict(self.since.offsets),
            ends={(topic.name, n): ends[topic.name, n] for topic, n in partitions}
            | {(topic.dead_letters.name, n): last[topic.dead_letters.name, n] for topic, n in partitions},
        )


def lost_offsets(first: Offsets) -> dict[TopicPartition, int]:
    """Return the partitions of ``EXPERIENCE_TOPICS`` that lost records, from the first offsets of the log.

    These topics are kept forever, so an intact partition begins at 0.
    """
    names = [(topic.name, n) for topic in EXPERIENCE_TOPICS for n in range(topic.num_partitions)]
    return {name: first[name] for name in names if first[name]}


@dataclass(frozen=True, slots=True)
class OffsetBounds:
    """A range as offsets, with which it can be read again after the log has grown.

    Attributes:
        lost: the first offsets of partitions that do not begin at 0: earlier records are lost.
        begins: partition of control.tamiyo.decisions -> first decision.
        ends: partition of each topic -> offset to stop before. Records with a dead letter today are skipped, so the
            ends of dead-letter topics are those of today.
    """

    lost: Mapping[TopicPartition, int]
    begins: Offsets
    ends: Offsets

    def contains(self, decision: Position) -> bool:
        """Return whether a decision is in the range."""
        return decision.offset >= self.begins[decision.topic, decision.partition]
