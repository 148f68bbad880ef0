"""How far the projections are behind the log."""

from dataclasses import dataclass
from typing import Any

from esper.config import KafkaSettings
from esper.oona.consumer import beginning_offsets, end_offsets
from esper.schemas.topics import TOPICS, all_topics
from esper.streams.positions import stored_positions


@dataclass(frozen=True, slots=True)
class TopicLag:
    """One topic: records in the log, and how many are not folded yet (None for dead letters)."""

    topic: str
    num_records: int
    lag: int | None


async def lags(connection: Any, kafka: KafkaSettings) -> list[TopicLag]:
    """Every topic and its dead letters."""
    stored = await stored_positions(connection)
    first, last = await beginning_offsets(kafka, all_topics()), await end_offsets(kafka, all_topics())
    found = []
    for spec in all_topics():
        places = [(spec.name, n) for n in range(spec.num_partitions)]
        records = sum(last[p] - first[p] for p in places)
        behind = sum(last[p] - stored.get(p, first[p]) for p in places) if spec in TOPICS else None
        found.append(TopicLag(spec.name, records, behind))
    return found
