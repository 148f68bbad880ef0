"""Oona, the event bus: CloudEvents on Kafka, with the topics and keys of ``esper.schemas``.

The public names are imported on first use, so that importing the package does not load the Kafka client:

- ``GroupConsumer``, ``GroupConsumerOptions``: read events as a member of a consumer group.
- ``EventBatch``, ``ReceivedEvent``: the argument of a handler, and one event in it.
- ``OonaProducer``: sends events.
- ``read_range``, ``follow``, ``StoredRecord``: read the log by offset, without a group.
- ``encode``, ``decode``: an event as a Kafka record and back, for another client of Kafka.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.oona.cloudevents import decode, encode
    from esper.oona.consumer.group_consumer import GroupConsumer, GroupConsumerOptions
    from esper.oona.consumer.partition_reader import EventBatch, ReceivedEvent
    from esper.oona.log_reader import StoredRecord, follow, read_range
    from esper.oona.producer import OonaProducer

__all__ = [
    "EventBatch",
    "GroupConsumer",
    "GroupConsumerOptions",
    "OonaProducer",
    "ReceivedEvent",
    "StoredRecord",
    "decode",
    "encode",
    "follow",
    "read_range",
]

_MODULES = {
    "EventBatch": "consumer.partition_reader",
    "GroupConsumer": "consumer.group_consumer",
    "GroupConsumerOptions": "consumer.group_consumer",
    "OonaProducer": "producer",
    "ReceivedEvent": "consumer.partition_reader",
    "StoredRecord": "log_reader",
    "decode": "cloudevents",
    "encode": "cloudevents",
    "follow": "log_reader",
    "read_range": "log_reader",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"esper.oona.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
