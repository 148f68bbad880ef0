"""Oona on the real broker, and the outbox through SIGKILL and a full disk."""

import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Producer
from waiting import wait_until

from esper.config import KafkaSettings
from esper.embedded.stack import EmbeddedStack
from esper.errors import OutboxFullError, UnavailableError
from esper.oona.consumer import partition_of, read_range
from esper.oona.outbox import Outbox
from esper.oona.producer import OonaProducer
from esper.oona.records import Record
from esper.oona.topics import TopicState, apply_topics, list_topics
from esper.schemas.events import RunEnded
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import RUNS

APPEND = """
import sys
from pathlib import Path
from esper.oona.records import Record
from esper.oona.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]))
outbox.open()
for n in range(1_000_000):
    outbox.append([Record("t", b"k", str(n).encode(), (("h", b"v"),), n)])
    print(n, flush=True)
"""


def record(n: int, size: int = 10) -> Record:
    return Record("t", b"k", str(n).encode().ljust(size), (("ce_id", b"x"),), n)


def test_what_the_outbox_took_survives_sigkill_in_order(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", APPEND, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _n in range(200)]
    writer.send_signal(signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    writer.wait(10)
    writer.stdout.close()
    outbox = Outbox(path)
    outbox.open()
    values = [int(r.value) for _id, r in outbox.oldest(1_000_000)]
    assert values[: len(told)] == told
    assert values == list(range(len(values)))
    assert len(values) - len(told) <= 1, "only the one that was being written may be there untold"
    outbox.remove_up_to(outbox.oldest(100)[-1][0])
    assert int(outbox.oldest(1)[0][1].value) == 100
    outbox.close()


def test_a_full_outbox_takes_all_or_nothing_and_goes_on_with_room(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.sqlite", max_pages=64)
    outbox.open()
    count = 0
    with pytest.raises(OutboxFullError, match="free some disk"):
        while True:
            outbox.append([record(count, 2_000), record(count + 1, 2_000)])
            count += 2
    assert len(outbox) == count > 50
    outbox.remove_up_to(outbox.oldest(20)[-1][0])
    outbox.append([record(count)])
    assert len(outbox) == count - 20 + 1
    outbox.close()


async def test_other_clients_choose_the_same_partition(stack: EmbeddedStack) -> None:
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


async def test_topics_are_made_once_and_never_changed(stack: EmbeddedStack) -> None:
    kafka = stack.settings().need_kafka()
    assert {s.state for s in await apply_topics(kafka)} == {TopicState.PRESENT}
    assert {s.state for s in await list_topics(kafka)} == {TopicState.PRESENT}


async def test_a_wrong_address_is_one_clear_error_within_seconds() -> None:
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    with pytest.raises(UnavailableError, match="no Kafka broker answers"):
        await list_topics(kafka)
    with pytest.raises(UnavailableError, match="no Kafka broker answers"):
        async with OonaProducer(kafka):
            pass
