"""Which part of the log a replay reads.

``--from`` chooses decisions; what they saw and what came of them is read wherever it lies. ``--until`` is the present
of the replay: nothing that lies behind it is seen, on any topic. So the same range gives the same experiences, however
the log grows.
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
READ = (DECISIONS, VIEWS, FIELD_REPORTS, LIFECYCLE)
"""The topics that experiences are made of."""


@dataclass(frozen=True, slots=True)
class ReplayRange:
    """What was asked for.

    Attributes:
        since: where the decisions begin; the log's start where it names neither a time nor an offset.
        until: what the replay sees of the log.
        runs: patterns of run ids (``*``, ``?``, ``[...]``); every run where there are none.
    """

    since: Cutoff = field(default_factory=Cutoff)
    until: Cutoff = field(default_factory=Cutoff)
    runs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, since: Sequence[str], until: Sequence[str], runs: Sequence[str]) -> "ReplayRange":
        """Read what an operator wrote.

        Raises:
            ConfigError: it is no range.
        """
        if EARLIEST in since and len(since) > 1:
            raise ConfigError(f"--from {EARLIEST} is the start of the log: leave the others away")
        begin = Cutoff() if list(since) == [EARLIEST] else Cutoff.parse(since, "--from")
        for topic, n in begin.offsets:
            if topic != DECISIONS.name:
                raise ConfigError(f"--from {topic}[{n}]@...: it chooses decisions, write {DECISIONS.name}[{n}]@OFFSET")
        return cls(begin, Cutoff.parse(until), tuple(runs))

    def wants(self, run_id: str) -> bool:
        """Whether a run is asked for."""
        return not self.runs or any(fnmatchcase(run_id, pattern) for pattern in self.runs)

    async def bounds(self, reader: LogReader) -> "OffsetBounds":
        """The range as offsets of the log as it is now.

        Raises:
            ConfigError: the log does not reach so far.
        """
        first, last, ends = await reader.first_offsets(), await reader.end_offsets(), await self.until.ends(reader)
        letters = [(t.dead_letters.name, n) for t in READ for n in range(t.num_partitions)]
        begins = first if self.since.at is None else await reader.offsets_at(self.since.at)
        return OffsetBounds(
            lost=lost(first),
            begins={(DECISIONS.name, n): begins[DECISIONS.name, n] for n in range(DECISIONS.num_partitions)}
            | dict(self.since.offsets),
            ends={(t.name, n): ends[t.name, n] for t in READ for n in range(t.num_partitions)}
            | {place: last[place] for place in letters},
        )


def lost(first: Offsets) -> dict[TopicPartition, int]:
    """Where what was written is gone, by the log's first offsets: these topics are kept for ever."""
    return {(t.name, n): first[t.name, n] for t in READ for n in range(t.num_partitions) if first[t.name, n]}


@dataclass(frozen=True, slots=True)
class OffsetBounds:
    """A range as offsets: with them it can be read again, whatever was added since.

    Attributes:
        lost: where the log does not begin at offset 0: what lay before is gone.
        begins: partitions of control.tamiyo.decisions -> first decision that is asked for.
        ends: partitions of all topics that are read -> offset to stop before. What has a dead letter today counts as
            passed over, so those of dead letters are today's.
    """

    lost: Mapping[TopicPartition, int]
    begins: Offsets
    ends: Offsets

    def holds(self, decision: Position) -> bool:
        """Whether a decision is asked for."""
        return decision.offset >= self.begins[decision.topic, decision.partition]
