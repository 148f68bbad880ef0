"""A record that is to be written, and where one is in the log.

Named tuples, since they are made by the hundred thousand a second; nothing here knows what is in them.
"""

from functools import lru_cache
from typing import NamedTuple

from aiokafka.partitioner import murmur2

TopicPartition = tuple[str, int]
"""A topic's name and the number of one of its partitions. A plain tuple: it equals aiokafka's class of this name."""

Headers = tuple[tuple[str, bytes | None], ...]

RECORD_LIMIT_BYTES = 4 * 1024 * 1024
"""The largest record that is sent, with its key and headers; topics are made to take it."""

KEYS_CACHED = 65_536  # (key, count) pairs whose partition is remembered: murmur2 in Python takes microseconds


class Position(NamedTuple):
    """Where a record is in the log."""

    topic: str
    partition: int
    offset: int


class Record(NamedTuple):
    """A record that is to be written. Its key chooses the partition, unless ``partition`` names one."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int
    partition: int | None = None

    @property
    def size_bytes(self) -> int:
        """Key, value and headers."""
        named = sum(len(name) + len(text or b"") for name, text in self.headers)
        return len(self.key or b"") + len(self.value or b"") + named


@lru_cache(KEYS_CACHED)
def partition_for(key: bytes, num_partitions: int) -> int:
    """The partition that every client of Kafka's own kind chooses for a key (murmur2, positive part)."""
    return int((murmur2(key) & 0x7FFFFFFF) % num_partitions)
