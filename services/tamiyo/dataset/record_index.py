"""An index of the records that experiences are made of. Pure; the order between partitions does not matter.

Invariant: of several equal records the one at the lowest offset of its partition counts. Duplicates, and the order of
reading, change nothing.
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
    """A message and its position in the log."""

    position: Position
    message: OonaMessage

    @property
    def location(self) -> str:
        """``TOPIC[PARTITION]@OFFSET``."""
        return _location(self.position)


@dataclass(slots=True)
class RecordIndex:
    """Filled by ``add``; read by ``join_experiences``.

    Attributes:
        is_wanted: selects runs by id.
        skipped_records: the records that the stream workers skipped, and why. They are skipped here too; if a dead
            letter was redriven, its copy counts.
        decisions: by boundary, every distinct decision.
        views: by boundary and digest.
        reports: by decision and report id.
        rejections: by command.
    """

    is_wanted: Callable[[str], bool] = field(default=lambda _run: True)
    skipped_records: Mapping[Position, str] = field(default_factory=dict)
    decisions: dict[Key, dict[bytes, SourcedEvent]] = field(default_factory=dict)
    views: dict[Key, dict[str, SourcedEvent]] = field(default_factory=dict)
    reports: dict[UUID, dict[UUID, SourcedEvent]] = field(default_factory=dict)
    rejections: dict[UUID, SourcedEvent] = field(default_factory=dict)
    _undecodable: dict[Position, Exclusion] = field(default_factory=dict)
    _redriven: set[Position] = field(default_factory=set)

    def add(self, record: StoredRecord) -> None:
        """Index one record, in any order.

        Raises:
            NewerVersionError: a newer program wrote it. Upgrade: skipping it would change the result.
        """
        run_id = (record.key or b"").decode(errors="replace")
        if not self.is_wanted(run_id):
            return
        origin, problem = first_origin(record.headers, record.position), self.skipped_records.get(record.position)
        try:
            sourced = SourcedEvent(record.position, record.decode()) if problem is None else None
        except DecodeError as error:
            sourced, problem = None, f"{error.reason}: {error.detail}"
        if sourced is None:
            exclusion = Exclusion(run_id, 0, 0, Reason.UNDECODABLE, _location(origin), problem or "")
            self._undecodable.setdefault(origin, exclusion)
            return
        if origin != record.position:
            self._redriven.add(origin)
        self._insert(sourced)

    @property
    def undecodable(self) -> list[Exclusion]:
        """Records that cannot be decoded and were not redriven successfully."""
        return [exclusion for origin, exclusion in sorted(self._undecodable.items()) if origin not in self._redriven]

    def _insert(self, sourced: SourcedEvent) -> None:
        match sourced.message.data:
            case DecisionMade() as event:
                key = (event.run_id, event.incarnation, event.boundary)
                _keep_first(self.decisions.setdefault(key, {}), event.model_dump_json().encode(), sourced)
            case ViewRecorded() as event:
                key = (event.run_id, event.incarnation, event.boundary)
                _keep_first(self.views.setdefault(key, {}), event.digest, sourced)
            case FieldReported() as event:
                _keep_first(self.reports.setdefault(event.decision_id, {}), sourced.message.id, sourced)
            case CommandRejected() as event:
                _keep_first(self.rejections, event.command_id, sourced)
            case _:
                pass

    def counting_decisions(self) -> Iterator[tuple[Key, SourcedEvent, list[SourcedEvent]]]:
        """Yield for each boundary the decision that counts, then its rivals in the order of the log."""
        for key in sorted(self.decisions):
            first, *rivals = sorted(self.decisions[key].values(), key=lambda sourced: sourced.position)
            yield key, first, rivals


def is_rejection(record: StoredRecord) -> bool:
    """Return whether a record of control.kasmina.lifecycle is a rejection, by its header alone."""
    return any(name == "ce_type" and (text or b"").startswith(REJECTED_TYPE) for name, text in record.headers)


def _location(position: Position) -> str:
    return f"{position.topic}[{position.partition}]@{position.offset}"


def _keep_first(found: dict[_Key, SourcedEvent], key: _Key, sourced: SourcedEvent) -> None:
    known = found.get(key)
    if known is None or sourced.position < known.position:
        found[key] = sourced
