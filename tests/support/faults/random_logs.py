"""Random logs: events of several runs and blueprints, with resends, garbage, redriven records and missing offsets.

A log is drawn as a list of recipes, which hypothesis can shrink, and then converted to the records of each partition.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st
from support.events.event_examples import EXAMPLES

from esper.oona.cloudevents import encode
from esper.oona.dead_letters.dead_letter import ORIGIN_HEADER
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position, TopicPartition, partition_for
from esper.schemas.events import Event, LayerHealthMeasured, TrainerEvent
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal
from esper.schemas.registry import registration
from esper.schemas.topics import TELEMETRY

Log = Mapping[TopicPartition, Sequence[StoredRecord]]

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)
RUNS = ("run-1", "run-33", "run-2")  # the first two are in one of twelve partitions
BLUEPRINTS = ("noop", "deep")  # all in one of six partitions
ODD_FLOATS = (0.1, 0.7, 1e-9, 1e15, -1e15, 3.3e-3, 7e22, -0.0)  # their sums depend on the order
GARBAGE = (b"", b"\x00\xff", b"{}", b'{"type": 1}', None)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One record. ``kind`` is event, resend, garbage or redriven; ``n`` varies it; ``hole`` offsets before it are missing."""

    kind: str
    example: int
    n: int
    hole: int


OF_TOPIC: dict[str, list[int]] = {}
for _n, _event in enumerate(EXAMPLES):
    OF_TOPIC.setdefault(registration(_event.type).topic.name, []).append(_n)


def _recipes(examples: Sequence[int]) -> st.SearchStrategy[list[Recipe]]:
    recipe = st.builds(
        Recipe,
        kind=st.sampled_from(["event"] * 6 + ["resend", "garbage", "redriven", "redriven"]),
        example=st.sampled_from(examples),
        n=st.integers(0, 40),
        hole=st.sampled_from([0] * 9 + [1, 3]),
    )
    return st.lists(recipe, min_size=6, max_size=24)


RECIPES = st.sampled_from([*[TELEMETRY.name] * 6, *OF_TOPIC]).flatmap(lambda topic: _recipes(OF_TOPIC[topic]))
"""Logs of one topic each, since projections of two topics are independent. Most have health reports, which cache most."""


def varied(event: Event, n: int, sequences: dict[Any, int]) -> Event:
    """The example with another run, seed, boundary and step, and the next sequence of its incarnation."""
    fields: dict[str, Any] = {
        "run_id": RUNS[n % 3],
        "blueprint_id": BLUEPRINTS[n % 2],
        "incarnation": 1 + n % 2,
        "step": n * 3,
        "seed_id": n % 2,
        "boundary": 1 + n % 5,
        "epoch": n % 4,
        "expected_version": n % 4,
        "activation_id": uuid.UUID(int=n % 7),
    }
    changes = {name: value for name, value in fields.items() if name in type(event).model_fields}
    if isinstance(event, TrainerEvent):
        incarnation = (changes["run_id"], changes["incarnation"])
        changes["sequence"] = sequences[incarnation] = sequences.get(incarnation, -1) + 1
    if isinstance(event, LayerHealthMeasured):
        values = [ODD_FLOATS[(n + k) % len(ODD_FLOATS)] for k in range(2)]
        changes["signals"] = tuple(
            HealthSignal(
                layer_id="fc1", seed_id=k, chunk_id=0, epoch=0, health_score=0.1 + k / 2, activation_mean=value
            )
            if n % 5
            else HealthSignal(layer_id="fc1", seed_id=k, chunk_id=0, epoch=0, health_score=0.0, gradient_norm=None)
            for k, value in enumerate(values)
        )
    if "kernel" in type(event).model_fields:
        kernel: Any = event
        changes["kernel"] = kernel.kernel.model_copy(update={"blueprint_id": changes["blueprint_id"]})
    return event.model_copy(update=changes)


def make_log(recipes: Sequence[Recipe], first: int = 0) -> dict[TopicPartition, list[StoredRecord]]:
    """The records of every partition that has any; each partition starts at offset ``first``."""
    log: dict[TopicPartition, list[StoredRecord]] = {}
    sequences: dict[Any, int] = {}
    for number, recipe in enumerate(recipes):
        at = MIDNIGHT + timedelta(hours=number)  # across midnight, where partitions of tables begin
        record = event_record(recipe, number, sequences, at)
        records = log.setdefault((record.position.topic, record.position.partition), [])
        offset = (records[-1].position.offset + 1 if records else first) + recipe.hole
        records.append(_record_at(recipe, record, records, offset))
    return log


def event_record(recipe: Recipe, number: int, sequences: dict[Any, int], at: datetime) -> StoredRecord:
    """The record of a recipe, without an offset."""
    event = varied(EXAMPLES[recipe.example], recipe.n, sequences)
    entry = registration(event.type)
    encoded = encode(OonaMessage.of(event, id=uuid.UUID(int=number), source="test", time=at))
    partition = partition_for(encoded.key or b"", entry.topic.num_partitions)
    return StoredRecord(
        Position(encoded.topic, partition, 0), encoded.key, encoded.value, encoded.headers, encoded.timestamp_ms
    )


def _record_at(recipe: Recipe, record: StoredRecord, before: Sequence[StoredRecord], offset: int) -> StoredRecord:
    position = record.position._replace(offset=offset)
    earlier = before[recipe.n % len(before)] if before else None
    match recipe.kind:
        case "resend" if earlier is not None:
            return earlier._replace(position=position, timestamp_ms=record.timestamp_ms)
        case "redriven" if earlier is not None:
            origin = f"{position.topic}/{position.partition}/{earlier.position.offset}".encode()
            kept = tuple(h for h in earlier.headers if h[0] != ORIGIN_HEADER)
            return earlier._replace(
                position=position, headers=(*kept, (ORIGIN_HEADER, origin)), timestamp_ms=record.timestamp_ms
            )
        case "garbage":
            return record._replace(position=position, value=GARBAGE[recipe.n % len(GARBAGE)])
    return record._replace(position=position)
