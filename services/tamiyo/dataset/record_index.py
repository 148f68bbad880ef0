"""What a replay needs of the log, sorted by what belongs together. Pure; no order between partitions matters.

Invariant: of several records that say the same, the one at the lowest offset of its partition counts. So resends,
and reading in any order, change nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import UUID

from esper.errors import DecodeError
from esper.oona.dead_letters.dead_letter import first_origin
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position
from esper.schemas.events import CommandRejected, DecisionMade, FieldReported, ViewRecorded
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.dataset.exclusions import Exclusion, Reason
from esper.services.tamiyo.dataset.experiences import Key

REJECTED_TYPE = b"esper.command.rejected."

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class SourcedEvent:
    """A message and where it lies."""

    position: Position
    message: OonaMessage

    @property
    def place(self) -> str:
        """``TOPIC[PARTITION]@OFFSET``."""
        return place_of(self.position)


@dataclass(slots=True)
class RecordIndex:
    """Made by ``add``; read by ``esper.services.tamiyo.dataset.experience_join``.

    Attributes:
        is_wanted: whether a run is asked for.
        passed_over: the records that the stream workers passed over, and why. They are left out here too: of a letter
            that was redriven its copy counts.
        decisions: by boundary every decision that says something new.
        views: by boundary and digest.
        reports: by the decision that they name, each told once.
        rejections: by command.
    """

    is_wanted: Callable[[str], bool] = field(default=lambda _run: True)
    skipped_record: Mapping[Position, str] = field(default_factory=dict)
    decisions: dict[Key, dict[bytes, SourcedEvent]] = field(default_factory=dict)
    views: dict[Key, dict[str, SourcedEvent]] = field(default_factory=dict)
    reports: dict[UUID, dict[UUID, SourcedEvent]] = field(default_factory=dict)
    rejections: dict[UUID, SourcedEvent] = field(default_factory=dict)
    _broken: dict[Position, Exclusion] = field(default_factory=dict)
    _mended: set[Position] = field(default_factory=set)

    def add(self, record: StoredRecord) -> None:
        """Take in one record of the topics that a replay reads, in any order.

        Raises:
            NewerVersionError: a newer program wrote it: upgrade, nothing is skipped.
        """
        run_id = (record.key or b"").decode(errors="replace")
        if not self.is_wanted(run_id):
            return
        origin, reason = first_origin(record.headers, record.position), self.skipped_record.get(record.position)
        try:
            heard = SourcedEvent(record.position, record.decode()) if reason is None else None
        except DecodeError as error:
            heard, reason = None, f"{error.reason}: {error.detail}"
        if heard is None:
            told = Exclusion(run_id, 0, 0, Reason.UNDECODABLE, place_of(origin), reason or "")
            self._broken.setdefault(origin, told)
            return
        if origin != record.position:
            self._mended.add(origin)
        self._sort(heard)

    @property
    def broken(self) -> list[Exclusion]:
        """Records that are no events, and were not redriven as something better."""
        return [told for origin, told in sorted(self._broken.items()) if origin not in self._mended]

    def _sort(self, heard: SourcedEvent) -> None:
        match heard.message.data:
            case DecisionMade() as event:
                key = (event.run_id, event.incarnation, event.boundary)
                _keep_first(self.decisions.setdefault(key, {}), event.model_dump_json().encode(), heard)
            case ViewRecorded() as event:
                key = (event.run_id, event.incarnation, event.boundary)
                _keep_first(self.views.setdefault(key, {}), event.digest, heard)
            case FieldReported() as event:
                _keep_first(self.reports.setdefault(event.decision_id, {}), heard.message.id, heard)
            case CommandRejected() as event:
                _keep_first(self.rejections, event.command_id, heard)
            case _:
                pass

    def counting_decisions(self) -> Iterator[tuple[Key, SourcedEvent, list[SourcedEvent]]]:
        """By boundary: the decision that counts, and its rivals, in the order of the log."""
        for key in sorted(self.decisions):
            first, *rivals = sorted(self.decisions[key].values(), key=lambda heard: heard.position)
            yield key, first, rivals


def is_rejection(record: StoredRecord) -> bool:
    """Whether a record of control.kasmina.lifecycle is a rejection, by its header: transitions are not decoded."""
    return any(name == "ce_type" and (text or b"").startswith(REJECTED_TYPE) for name, text in record.headers)


def place_of(position: Position) -> str:
    """As an operator writes it."""
    return f"{position.topic}[{position.partition}]@{position.offset}"


def _keep_first(found: dict[_Key, SourcedEvent], key: _Key, heard: SourcedEvent) -> None:
    known = found.get(key)
    if known is None or heard.position < known.position:
        found[key] = heard
