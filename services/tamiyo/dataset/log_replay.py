"""Reads experiences from Kafka: decisions first, then only the views that they name.

Commits no offset and writes nothing. A header holds the id of a view, so that views of other decisions are not decoded.
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
from esper.services.tamiyo.dataset.experience_join import ExperienceJoin, join_experiences
from esper.services.tamiyo.dataset.log_ranges import EXPERIENCE_TOPICS, OffsetBounds, ReplayRange, lost_offsets
from esper.services.tamiyo.dataset.record_index import RecordIndex, is_rejection
from esper.services.tamiyo.settings import RentSettings
from esper.streams.dead_letters import projection_dead_letter
from esper.streams.replay import ProgressCallback, ReplayProgress
from esper.streams.replay.replay_log_reader import LogReader, Offsets, open_log
from esper.streams.replay.replay_projection import ignore_progress


@dataclass(frozen=True, slots=True)
class Replay:
    """The experiences of a range, and the range as offsets."""

    bounds: OffsetBounds
    joined: ExperienceJoin
    num_records: int

    @property
    def exclusions(self) -> tuple[Exclusion, ...]:
        """What gave no experience."""
        return self.joined.exclusions


async def replay(
    kafka: KafkaSettings,
    log_range: ReplayRange,
    rent: RentSettings,
    *,
    bounds: OffsetBounds | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Replay:
    """Read the experiences of a range of the log.

    Args:
        bounds: read these offsets again; of ``log_range`` the patterns of runs alone are then used.

    Raises:
        ConfigError: the log ends before the range.
        NewerVersionError: a newer program wrote to the log: upgrade.
        NotAllowedError, UnavailableError: as every client of Oona.
    """
    topics = (*EXPERIENCE_TOPICS, *(t.dead_letters for t in EXPERIENCE_TOPICS))
    async with AsyncExitStack() as exits:
        reader = await exits.enter_async_context(open_log(kafka, topics))
        if bounds is None:
            found = await log_range.bounds(reader)
        else:
            found = replace(bounds, lost=lost_offsets(await reader.first_offsets()))
        log_pass = _LogPass(reader, found, log_range, on_progress)
        await log_pass.read_all()
        total = len(log_pass.index.decisions)

        def report(num: int) -> None:
            on_progress(ReplayProgress("joining decisions", num, max(num, total)))

        joined = join_experiences(log_pass.index, rent, found.contains, report)
        return Replay(found, joined, log_pass.num_records)


class _LogPass:
    """One pass over the log, topic by topic."""

    def __init__(
        self, reader: LogReader, bounds: OffsetBounds, log_range: ReplayRange, on_progress: ProgressCallback
    ) -> None:
        self.index = RecordIndex(is_wanted=log_range.includes_run)
        self.num_records = 0
        self._reader, self._bounds, self._on_progress = reader, bounds, on_progress
        self._first: Offsets = {}
        self._last: Offsets = {}

    async def read_all(self) -> None:
        """Read the topics. The order is the design: dead letters name records to skip, decisions name their views."""
        self._first, self._last = await self._reader.first_offsets(), await self._reader.end_offsets()
        self.index.skipped_records = await self._skipped_records()
        await self._read(DECISIONS, self.index.add)
        wanted = {str(ids.view_id(*key)).encode() for key in self.index.decisions}
        await self._read(VIEWS, lambda record: self._add_view(record, wanted))
        await self._read(FIELD_REPORTS, self.index.add)
        await self._read(LIFECYCLE, self._add_rejection)

    def _add_view(self, record: StoredRecord, wanted: set[bytes]) -> None:
        view_ids = [text for name, text in record.headers if name == "ce_id"]
        if not view_ids or view_ids[-1] in wanted:  # a record without an id is no event: the index excludes it
            self.index.add(record)

    def _add_rejection(self, record: StoredRecord) -> None:
        if is_rejection(record):
            self.index.add(record)

    async def _skipped_records(self) -> Mapping[Position, str]:
        found: dict[Position, str] = {}

        def add(record: StoredRecord) -> None:
            dead_letter = projection_dead_letter(record)
            if dead_letter is not None:
                found[dead_letter.origin] = f"{dead_letter.reason}: {dead_letter.detail}"

        for topic in EXPERIENCE_TOPICS:
            await self._read(topic.dead_letters, add)
        return found

    async def _read(self, topic: TopicSpec, handle: Callable[[StoredRecord], None]) -> None:
        partitions = [(topic.name, n) for n in range(topic.num_partitions)]
        starts = {p: self._first[p] for p in partitions}
        ends = {p: min(self._bounds.ends.get(p, self._last[p]), self._last[p]) for p in partitions}
        num_expected, num_read = sum(max(0, ends[p] - starts[p]) for p in partitions), 0
        async with aclosing(self._reader.read(starts, ends)) as batches:
            async for batch in batches:
                for record in batch.records:
                    handle(record)
                num_read += len(batch.records)
                self._on_progress(ReplayProgress(f"reading {topic.name}", num_read, num_expected))
        self.num_records += num_read
