"""Reads experiences from Kafka: decisions first, then only those views that they name.

Nothing is committed and nothing is written. Views are told apart by their id in a header, so that those of other
decisions are not decoded.
"""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace

from esper.config import KafkaSettings
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position
from esper.schemas import ids
from esper.schemas.topics import DECISIONS, FIELD_REPORTS, LIFECYCLE, VIEWS, TopicSpec
from esper.services.tamiyo.dataset.exclusions import Exclusion
from esper.services.tamiyo.dataset.experience_join import ExperienceJoin, join
from esper.services.tamiyo.dataset.log_ranges import READ, OffsetBounds, ReplayRange, lost
from esper.services.tamiyo.dataset.record_index import RecordIndex, is_rejection
from esper.services.tamiyo.dataset.report_rewards import RewardFunction
from esper.streams.dead_letters import skipped_record
from esper.streams.replay import ProgressCallback, ReplayProgress
from esper.streams.replay.replay_log_reader import LogReader, Offsets, open_log
from esper.streams.replay.replay_projection import ignore_progress


@dataclass(frozen=True, slots=True)
class Replay:
    """What was read, and from where."""

    bounds: OffsetBounds
    joined: ExperienceJoin
    num_records: int

    @property
    def exclusions(self) -> tuple[Exclusion, ...]:
        """What no experience could be made of."""
        return self.joined.exclusions


async def replay(
    kafka: KafkaSettings,
    asked: ReplayRange,
    rewarding: RewardFunction,
    *,
    bounds: OffsetBounds | None = None,
    tell: ProgressCallback = ignore_progress,
) -> Replay:
    """Read the experiences of a range of the log.

    Args:
        rewarding: what a report is worth.
        bounds: read these again, whatever ``asked`` says of its ends; its runs count.

    Raises:
        ConfigError: the log does not reach so far.
        NewerVersionError: a newer program wrote to it: upgrade.
        NotAllowedError, UnavailableError: as every client of Oona.
    """
    topics = (*READ, *(t.dead_letters for t in READ))
    async with AsyncExitStack() as exits:
        reader = await exits.enter_async_context(open_log(kafka, topics))
        if bounds is None:
            found = await asked.bounds(reader)
        else:
            found = replace(bounds, lost=lost(await reader.first_offsets()))
        reading = _Reading(reader, found, asked, tell)
        await reading.read_all()
        count = len(reading.gathered.decisions)
        joined = join(
            reading.gathered,
            rewarding,
            found.holds,
            lambda n: tell(ReplayProgress("joining decisions", n, max(n, count))),
        )
        return Replay(found, joined, reading.num_records)


class _Reading:
    """One pass over the log, topic by topic."""

    def __init__(self, reader: LogReader, bounds: OffsetBounds, asked: ReplayRange, tell: ProgressCallback) -> None:
        self.gathered = RecordIndex(is_wanted=asked.wants)
        self.num_records = 0
        self._reader, self._bounds, self._tell = reader, bounds, tell
        self._first: Offsets = {}
        self._last: Offsets = {}

    async def read_all(self) -> None:
        """The order is the design: letters say what to leave out, decisions say which views are needed."""
        self._first, self._last = await self._reader.first_offsets(), await self._reader.end_offsets()
        self.gathered.skipped_record = await self._letters()
        await self._read(DECISIONS, self.gathered.add)
        wanted = {str(ids.view_id(*key)).encode() for key in self.gathered.decisions}
        await self._read(VIEWS, lambda record: self._add_view(record, wanted))
        await self._read(FIELD_REPORTS, self.gathered.add)
        await self._read(LIFECYCLE, self._add_rejection)

    def _add_view(self, record: StoredRecord, wanted: set[bytes]) -> None:
        named = [text for name, text in record.headers if name == "ce_id"]
        if not named or named[-1] in wanted:  # one without an id is told of, as a record that is no event
            self.gathered.add(record)

    def _add_rejection(self, record: StoredRecord) -> None:
        if is_rejection(record):
            self.gathered.add(record)

    async def _letters(self) -> Mapping[Position, str]:
        found: dict[Position, str] = {}

        def learn(record: StoredRecord) -> None:
            letter = skipped_record(record)
            if letter is not None:
                found[letter.origin] = f"{letter.reason}: {letter.detail}"

        for topic in READ:
            await self._read(topic.dead_letters, learn)
        return found

    async def _read(self, topic: TopicSpec, take: Callable[[StoredRecord], None]) -> None:
        places = [(topic.name, n) for n in range(topic.num_partitions)]
        starts = {place: self._first[place] for place in places}
        ends = {place: min(self._bounds.ends.get(place, self._last[place]), self._last[place]) for place in places}
        expected, seen = sum(max(0, ends[p] - starts[p]) for p in places), 0
        phase = f"reading {topic.name}"
        async with aclosing(self._reader.read(starts, ends)) as batches:
            async for batch in batches:
                for record in batch.records:
                    take(record)
                seen += len(batch.records)
                self._tell(ReplayProgress(phase, seen, expected))
        self.num_records += seen
