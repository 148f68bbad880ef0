"""Finds dead letters and sends their records again, in batches, with an event for each.

Invariant: the record is sent before the event that records the redrive. A crash in between sends the record again on
the next call; readers recognize it by its origin and apply it once.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from esper.config import KafkaSettings
from esper.errors import ConfigError, ContractError
from esper.oona.cloudevents import decode
from esper.oona.dead_letters.dead_letter import DeadLetter, read_dead_letter, redriven_record
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.oona.records import Position
from esper.schemas import ids
from esper.schemas.events import DeadLetterRedriven
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import REDRIVES, TOPICS, TopicSpec

BATCH_SIZE = 100  # the most records that a crash makes a redrive send twice
SOURCE = "esper/dlq"
FIELDS = ("topic", "partition", "offset", "reason", "error", "type", "key", "source")


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on dead letters: a field equals a text, or contains it (``field~text``)."""

    field: str
    text: str
    is_substring: bool

    @classmethod
    def parse(cls, condition: str) -> "Condition":
        """Parse ``field=text`` or ``field~text``.

        Raises:
            ConfigError: it is neither, or the field is unknown.
        """
        for sign in ("=", "~"):
            field, found, text = condition.partition(sign)
            if found and field in FIELDS:
                return cls(field, text, sign == "~")
        raise ConfigError(
            f"--where {condition!r}: write FIELD=TEXT or FIELD~SUBSTRING, with one of {', '.join(FIELDS)}"
        )

    def holds(self, letter: DeadLetter) -> bool:
        """Whether a dead letter meets the condition."""
        value = field_values(letter)[self.field]
        return self.text in value if self.is_substring else self.text == value


def field_values(letter: DeadLetter) -> Mapping[str, str]:
    """The values of a dead letter's ``FIELDS``."""
    headers = {name: (text or b"").decode(errors="replace") for name, text in letter.record.headers}
    return {
        "topic": letter.origin.topic,
        "partition": str(letter.origin.partition),
        "offset": str(letter.origin.offset),
        "reason": letter.reason,
        "error": letter.error,
        "type": headers.get("ce_type", ""),
        "source": headers.get("ce_source", ""),
        "key": (letter.record.key or b"").decode(errors="replace"),
    }


async def find_dead_letters(
    kafka: KafkaSettings, topics: Iterable[TopicSpec] = TOPICS, conditions: Sequence[Condition] = ()
) -> AsyncIterator[DeadLetter]:
    """The dead letters that meet all conditions, topic by topic. Other records of dead-letter topics are skipped.

    A worker that crashes after sending a dead letter sends it again; only the first one is returned.

    Raises:
        NotAllowedError, UnavailableError: the broker refuses this client, or none answers.
    """
    for topic in topics:
        seen = set[tuple[Position, str]]()
        async for stored in read_range(kafka, topic.dead_letters):
            try:
                letter = read_dead_letter(stored)
            except ContractError:
                continue
            if (letter.origin, letter.reader) not in seen and all(condition.holds(letter) for condition in conditions):
                seen.add((letter.origin, letter.reader))
                yield letter


async def find_redriven(kafka: KafkaSettings) -> frozenset[Position]:
    """The positions of the dead letters that were redriven, from the redrive events."""
    positions = set()
    async for stored in read_range(kafka, REDRIVES):
        try:
            event = stored.decode().data
        except ContractError:
            continue
        if isinstance(event, DeadLetterRedriven):
            positions.add(Position(event.topic, event.partition, event.letter_offset))
    return frozenset(positions)


def is_redriven(letter: DeadLetter, redriven: frozenset[Position]) -> bool:
    """Whether a dead letter is among those that ``find_redriven`` returned."""
    return Position(letter.origin.topic, letter.position.partition, letter.position.offset) in redriven


def decode_problem(letter: DeadLetter) -> str:
    """Why this program still cannot decode the record; empty if it can."""
    record = letter.record
    try:
        decode(letter.first_origin.topic, record.value, record.headers)
    except ContractError as error:
        return str(error)
    return ""


async def redrive(producer: OonaProducer, dead_letters: Sequence[DeadLetter], redrive_id: UUID, reason: str) -> None:
    """Send the records of dead letters again, in order, with a redrive event for each.

    Raises:
        UnavailableError, NotAllowedError: Kafka did not accept all of it. Dead letters with a redrive event are done;
            a call for the others completes the redrive.
    """
    for start in range(0, len(dead_letters), BATCH_SIZE):
        batch = dead_letters[start : start + BATCH_SIZE]
        positions = await producer.send_records([redriven_record(letter) for letter in batch])
        await producer.send_batch(
            [_redrive_event(letter, p, redrive_id, reason) for letter, p in zip(batch, positions, strict=True)]
        )


def _redrive_event(letter: DeadLetter, position: Position, redrive_id: UUID, reason: str) -> OonaMessage:
    topic, partition, offset = letter.first_origin
    event = DeadLetterRedriven(
        topic=topic,
        partition=partition,
        offset=offset,
        letter_offset=letter.position.offset,
        redriven_offset=position.offset,
        redrive_id=redrive_id,
        reason=reason,
    )
    return OonaMessage.of(
        event, id=ids.redriven_id(redrive_id, topic, partition, letter.position.offset), source=SOURCE
    )
