"""The result of a send, record by record: the position in the log, or the error that kept it out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from esper.errors import EsperError, UnavailableError
from esper.oona.records import Position, Record

_NO_OFFSET = -2  # not -1: a broker that recognizes a resend but no longer has its offset returns -1


class DeliveryResult(NamedTuple):
    """The result for one record: ``position``, or the ``error`` that kept it out of the log.

    The offset is -1 where the record is a resend whose offset the broker has forgotten.
    """

    record: Record
    position: Position | None
    error: EsperError | None


class DeliveryResults:
    """The results of one send, in the order of its records. Iterating creates a ``DeliveryResult`` for each."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._partitions = [_NO_OFFSET] * len(records)
        self._offsets = [_NO_OFFSET] * len(records)
        self._errors: dict[int, EsperError] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[DeliveryResult]:
        for index, record in enumerate(self.records):
            if self._offsets[index] == _NO_OFFSET:
                yield DeliveryResult(record, None, self._errors.get(index))
            else:
                position = Position(record.topic, self._partitions[index], self._offsets[index])
                yield DeliveryResult(record, position, None)

    @property
    def errors(self) -> list[EsperError]:
        """The errors of the records that are not in the log."""
        return list(self._errors.values())

    def positions(self) -> list[Position]:
        """The position of every record.

        Raises:
            EsperError: the error of a record that is not in the log; one that a retry cannot cure comes first.
        """
        for error in sorted(self._errors.values(), key=lambda e: isinstance(e, UnavailableError)):
            raise error
        return [d.position for d in self if d.position is not None]

    def unsent(self) -> list[int]:
        """The indices of the records that are not in the log and that a retry may still deliver."""
        return [
            n
            for n, offset in enumerate(self._offsets)
            if offset == _NO_OFFSET and isinstance(self._errors.get(n, _NOT_SENT), UnavailableError)
        ]

    def note_acknowledged(self, indices: Iterable[int], partition: int, base_offset: int) -> None:
        """Note that a batch is in the log, its first record at ``base_offset``."""
        for n, index in enumerate(indices):
            self._partitions[index] = partition
            self._offsets[index] = base_offset + n if base_offset >= 0 else -1
            if self._errors:
                self._errors.pop(index, None)

    def note_failed(self, indices: Iterable[int], error: EsperError) -> None:
        """Note why records are not in the log; records that are in it are left as they are."""
        for index in indices:
            if self._offsets[index] == _NO_OFFSET:
                self._errors[index] = error


_NOT_SENT = UnavailableError("not sent yet")
