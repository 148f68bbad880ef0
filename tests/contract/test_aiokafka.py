"""The private parts of aiokafka that RenewableProducer uses: an upgrade that changes one fails here.

After a failure: read the new source, compare it with ``_abandon`` in esper/oona/renewable_producer.py, run `make faults`,
and only then write the new digest here.
"""

import hashlib
import inspect
import tomllib
from importlib.metadata import version

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.producer.message_accumulator import MessageAccumulator, MessageBatch
from aiokafka.producer.sender import Sender
from packaging.requirements import Requirement
from support.paths import ROOT

VERSION = "0.14.0"
DIGESTS = {
    # replaced in an abandoned producer
    MessageAccumulator.reenqueue: "f75f518a1ae2",
    # called, or relied on not to wait for batches that have failed
    AIOKafkaProducer.stop: "43ef97147111",
    AIOKafkaProducer.flush: "d70a0cb58abb",
    MessageAccumulator.close: "f1d449c7937f",
    MessageAccumulator.fail_all: "f1e12e8100bf",
    MessageAccumulator.flush: "2b0eaa3da851",
    MessageBatch.failure: "719b2122c318",
    Sender.close: "f60b3d023d25",
    Sender._sender_routine: "2380dc5e333d",
}


def test_version_is_the_one_that_was_read() -> None:
    assert version("aiokafka") == VERSION
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (requirement,) = [r for r in map(Requirement, dependencies) if r.name == "aiokafka"]
    assert version("aiokafka") in requirement.specifier
    assert "0.15.0" not in requirement.specifier, "private attributes may change in a minor release"


@pytest.mark.parametrize("function", DIGESTS, ids=lambda f: f.__qualname__)
def test_source_is_unchanged(function: object) -> None:
    source = inspect.getsource(function)  # type: ignore[arg-type]
    assert hashlib.sha256(source.encode()).hexdigest()[:12] == DIGESTS[function]  # type: ignore[index]


async def test_private_attributes_exist() -> None:
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", acks="all", enable_idempotence=True)
    accumulator = producer._message_accumulator
    assert isinstance(accumulator, MessageAccumulator)
    assert (accumulator._pending_batches, dict(accumulator._batches)) == (set(), {})
    assert isinstance(producer._sender, Sender)
    assert producer._sender.sender_task is None, "set by start()"
    assert producer._closed is False
    batch = MessageBatch(TopicPartition("topic", 0), producer.create_batch(), ttl=1, linger_time=0)
    assert not batch.future.done()
    assert not batch._drain_waiter.done()
    await producer.stop()
