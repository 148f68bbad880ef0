"""Looks through dead letters and sends them again: bounded, told by events, never folded twice.

The order is the design: the record first, the event that tells of it second. Who dies in between
sends the record again; readers know it by its origin.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from esper.config import KafkaSettings
from esper.errors import ConfigError, ContractError
from esper.oona.cloudevents import decode
from esper.oona.dead_letters.dead_letter import DeadLetter, read_letter, redriven
from esper.oona.log_reader import read_range
from esper.oona.producer import OonaProducer
from esper.oona.records import Position
from esper.schemas import ids
from esper.schemas.events import DeadLetterRedriven
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import REDRIVES, TOPICS, TopicSpec

BATCH = 100  # letters that a crash may send twice
SOURCE = "esper/dlq"
FIELDS = ("topic", "partition", "offset", "reason", "error", "type", "key", "source")


@dataclass(frozen=True, slots=True)
class Where:
    """A condition on letters: a field equals a text, or contains it (``field~text``)."""

    field: str
    text: str
    is_part: bool

    @classmethod
    def parse(cls, condition: str) -> "Where":
        """Read ``field=text`` or ``field~text``.

        Raises:
            ConfigError: it is neither, or there is no such field.
        """
        for sign in ("=", "~"):
            field, found, text = condition.partition(sign)
            if found and field in FIELDS:
                return cls(field, text, sign == "~")
        raise ConfigError(f"--where {condition!r}: write FIELD=TEXT or FIELD~PART, with one of {', '.join(FIELDS)}")

    def holds(self, letter: DeadLetter) -> bool:
        """Whether a letter is meant."""
        value = describe(letter)[self.field]
        return self.text in value if self.is_part else self.text == value


def describe(letter: DeadLetter) -> Mapping[str, str]:
    """What conditions see of a letter: the place and the headers of the record, and what is wrong with it."""
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


async def find_letters(
    kafka: KafkaSettings, topics: Iterable[TopicSpec] = TOPICS, where: Sequence[Where] = ()
) -> AsyncIterator[DeadLetter]:
    """The letters that meet all conditions, topic by topic, each once; other records are passed over.

    A worker that dies after sending a letter sends it again: the first of those counts.
    """
    for topic in topics:
        seen = set[tuple[Position, str]]()
        async for stored in read_range(kafka, topic.dead_letters):
            try:
                letter = read_letter(stored)
            except ContractError:
                continue
            if (letter.origin, letter.reader) not in seen and all(condition.holds(letter) for condition in where):
                seen.add((letter.origin, letter.reader))
                yield letter


async def already_redriven(kafka: KafkaSettings) -> frozenset[Position]:
    """The places of the letters that an event tells of as sent again."""
    found = set()
    async for stored in read_range(kafka, REDRIVES):
        try:
            event = stored.decode().data
        except ContractError:
            continue
        if isinstance(event, DeadLetterRedriven):
            found.add(Position(event.topic, event.partition, event.letter_offset))
    return frozenset(found)


def is_redriven(letter: DeadLetter, done: frozenset[Position]) -> bool:
    """Whether a letter is among those that were sent again."""
    return Position(letter.origin.topic, letter.position.partition, letter.position.offset) in done


def why_unreadable(letter: DeadLetter) -> str:
    """Why this program still cannot read the record; empty where it can."""
    record = letter.record
    try:
        decode(letter.first_origin.topic, record.value, record.headers)
    except ContractError as error:
        return str(error)
    return ""


async def redrive(producer: OonaProducer, letters: Sequence[DeadLetter], redrive_id: UUID, reason: str) -> None:
    """Send letters again and tell so, in their order.

    Raises:
        UnavailableError: Kafka is away; what was told of is done, calling it again does the rest.
    """
    for start in range(0, len(letters), BATCH):
        batch = letters[start : start + BATCH]
        sent = await producer.send_records([redriven(letter) for letter in batch])
        told = [_told(letter, place, redrive_id, reason) for letter, place in zip(batch, sent, strict=True)]
        await producer.send_batch(told)


def _told(letter: DeadLetter, sent_to: Position, redrive_id: UUID, reason: str) -> OonaMessage:
    topic, partition, offset = letter.first_origin
    event = DeadLetterRedriven(
        topic=topic,
        partition=partition,
        offset=offset,
        letter_offset=letter.position.offset,
        redriven_offset=sent_to.offset,
        redrive_id=redrive_id,
        reason=reason,
    )
    return OonaMessage.of(
        event, id=ids.redriven_id(redrive_id, topic, partition, letter.position.offset), source=SOURCE
    )
