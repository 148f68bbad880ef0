"""The event bus next to other clients of Kafka: the same partitions, unchanged topics, one clear error."""

import uuid

import pytest
from confluent_kafka import Producer
from support.conditions import wait_until

from esper.config import KafkaSettings
from esper.embedded.stack import EmbeddedStack
from esper.errors import UnavailableError
from esper.oona.admin.topics import TopicState, apply_topics, list_topics
from esper.oona.log_reader import partition_of, read_range
from esper.oona.producer import OonaProducer
from esper.schemas.events import RunEnded
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import RUNS


async def test_partitioner_matches_other_clients(stack: EmbeddedStack) -> None:
    kafka = stack.settings().need_kafka()
    keys = [f"run-{uuid.uuid4().hex}" for _n in range(24)]
    theirs: dict[str, int] = {}
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "partitioner": "murmur2_random"})
    for key in keys:
        producer.produce(
            RUNS.dead_letters.name,
            b"x",
            key=key,
            on_delivery=lambda _e, m: theirs.update({m.key().decode(): m.partition()}),
        )
    producer.flush(20)
    wait_until(lambda: len(theirs) == len(keys), 10)
    async with OonaProducer(kafka) as oona:
        ended = [RunEnded(run_id=k, incarnation=1, sequence=0, step=0, status="completed") for k in keys]
        positions = await oona.send_batch([OonaMessage.of(e, id=uuid.uuid4(), source="test") for e in ended])
    assert {k: p.partition for k, p in zip(keys, positions, strict=True)} == theirs
    assert theirs == {k: partition_of(k, RUNS) for k in keys}
    read = [r async for r in read_range(kafka, RUNS, partition=theirs[keys[0]])]
    assert keys[0].encode() in {r.key for r in read}


async def test_apply_topics_changes_nothing_that_exists(stack: EmbeddedStack) -> None:
    kafka = stack.settings().need_kafka()
    assert {s.state for s in await apply_topics(kafka)} == {TopicState.PRESENT}
    assert {s.state for s in await list_topics(kafka)} == {TopicState.PRESENT}


async def test_wrong_address_is_one_clear_error() -> None:
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    with pytest.raises(UnavailableError, match="no Kafka broker answers"):
        await list_topics(kafka)
    with pytest.raises(UnavailableError, match="no Kafka broker answers"):
        async with OonaProducer(kafka):
            pass
