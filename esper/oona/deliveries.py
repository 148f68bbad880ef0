"""What became of each record of a send: where it is, or why it is not there."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

from esper.errors import EsperError, UnavailableError
from esper.oona.records import Position, Record

_NOWHERE = -2  # not -1: a broker that knows a resend but not its place any more answers so


class Delivery(NamedTuple):
    """One record's result: ``position``, or the ``error`` that kept it from the log.

    The offset is -1 where the broker had the record already and has forgotten where.
    """

    record: Record
    position: Position | None
    error: EsperError | None


class Deliveries(Sequence[Delivery]):
    """The results of one send, in the order of its records; made one by one as they are asked for."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._partitions = [_NOWHERE] * len(records)
        self._offsets = [_NOWHERE] * len(records)
        self._errors: dict[int, EsperError] = {}

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Delivery: ...
    @overload
    def __getitem__(self, index: slice) -> list[Delivery]: ...
    def __getitem__(self, index: int | slice) -> Delivery | list[Delivery]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if self._offsets[number] == _NOWHERE:
            return Delivery(self.records[number], None, self._errors.get(number))
        place = Position(self.records[number].topic, self._partitions[number], self._offsets[number])
        return Delivery(self.records[number], place, None)

    @property
    def errors(self) -> list[EsperError]:
        """The errors of the records that are not in the log."""
        return list(self._errors.values())

    def positions(self) -> list[Position]:
        """Where every record is.

        Raises:
            EsperError: what kept one from the log; an error that a retry cannot mend comes first.
        """
        for error in sorted(self._errors.values(), key=lambda e: isinstance(e, UnavailableError)):
            raise error
        return [d.position for d in self if d.position is not None]

    def waiting(self) -> list[int]:
        """The records that are not in the log and may still get there."""
        return [
            n
            for n, offset in enumerate(self._offsets)
            if offset == _NOWHERE and isinstance(self._errors.get(n, _RETRY), UnavailableError)
        ]

    def arrived(self, numbers: Iterable[int], partition: int, base_offset: int) -> None:
        """Note that a batch is in the log, its first record at ``base_offset``."""
        for place, number in enumerate(numbers):
            self._partitions[number] = partition
            self._offsets[number] = base_offset + place if base_offset >= 0 else -1
            if self._errors:
                self._errors.pop(number, None)

    def failed(self, numbers: Iterable[int], error: EsperError) -> None:
        """Note why records are not in the log; those that are there stay there."""
        for number in numbers:
            if self._offsets[number] == _NOWHERE:
                self._errors[number] = error


_RETRY = UnavailableError("not sent yet")
