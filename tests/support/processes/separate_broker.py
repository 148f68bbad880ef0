"""Brokers, topics and numbered events that no other test uses."""

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiokafka.admin import NewTopic
from support.events.event_examples import EXAMPLES

from esper.config import KafkaSettings
from esper.embedded.kafka import EmbeddedKafka
from esper.oona.admin.topics import BATCH_LIMIT_BYTES, admin_client
from esper.oona.cloudevents import encode
from esper.oona.log_reader import StoredRecord, read_range
from esper.oona.records import Record
from esper.schemas.messages import OonaMessage, registration
from esper.schemas.topics import TopicSpec

EXAMPLE_OF = {registration(event.type).topic: event for event in EXAMPLES}


@contextmanager
def running_broker() -> Iterator[EmbeddedKafka]:
    """Run a broker without topics."""
    with tempfile.TemporaryDirectory(prefix="esper-test-", dir="/var/tmp") as folder:
        broker = EmbeddedKafka(Path(folder))
        try:
            broker.start()
            yield broker
        finally:
            broker.resume()
            broker.stop()


def settings_of(broker: EmbeddedKafka) -> KafkaSettings:
    """Settings of a client of the broker."""
    return KafkaSettings(bootstrap_servers=broker.bootstrap_servers)


async def make_topics(kafka: KafkaSettings, *specs: TopicSpec) -> None:
    """Create these topics as `esper topics apply` would."""
    async with admin_client(kafka) as client:
        # with timestamps of the records, a restarted broker forgets producers whose records look old
        wanted = {"max.message.bytes": str(BATCH_LIMIT_BYTES), "message.timestamp.type": "LogAppendTime"}
        response = await client.create_topics(
            [NewTopic(s.name, s.num_partitions, 1, topic_configs=wanted) for s in specs]
        )
    assert not any(code for _name, code, *_rest in response.topic_errors), response


async def new_topic(kafka: KafkaSettings, num_partitions: int = 3) -> TopicSpec:
    """Create a topic for records that are not events."""
    spec = TopicSpec(f"test.{uuid.uuid4().hex[:12]}", num_partitions)
    await make_topics(kafka, spec)
    return spec


def numbered(topic: TopicSpec, number: int, partition: int = 0) -> Record:
    """An event of a topic whose id is the number."""
    message = OonaMessage.of(EXAMPLE_OF[topic], id=uuid.UUID(int=number), source="test")
    return encode(message)._replace(partition=partition)


async def read_all(kafka: KafkaSettings, topic: TopicSpec) -> dict[int, list[StoredRecord]]:
    """Every record of each partition, in order."""
    found: dict[int, list[StoredRecord]] = {n: [] for n in range(topic.num_partitions)}
    async for record in read_range(kafka, topic):
        found[record.position.partition].append(record)
    return found
