"""Records and positions: what is written to the log, and where it is.

Pure values: nothing here connects to a broker or knows what a record's value means. They are named tuples because
they are created at hundreds of thousands a second.
"""

import base64
import json
from functools import lru_cache
from typing import NamedTuple

from aiokafka.partitioner import murmur2

TopicPartition = tuple[str, int]
"""A topic's name and the number of one of its partitions. A plain tuple: it equals aiokafka's class of this name."""

Headers = tuple[tuple[str, bytes | None], ...]

RECORD_LIMIT_BYTES = 4 * 1024 * 1024
"""The largest record that is sent, key and headers included; topics are created to accept it."""

MAX_CACHED_KEYS = 65_536  # (key, count) pairs whose partition is cached: murmur2 in Python takes microseconds


class Position(NamedTuple):
    """Where a record is in the log."""

    topic: str
    partition: int
    offset: int


class Record(NamedTuple):
    """A record to write. Its key determines the partition, unless ``partition`` names one."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int
    partition: int | None = None

    @property
    def size_bytes(self) -> int:
        """Size of key, value and headers together."""
        headers = sum(len(name) + len(value or b"") for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + headers


@lru_cache(MAX_CACHED_KEYS)
def partition_for(key: bytes, num_partitions: int) -> int:
    """The partition that Kafka's default partitioner chooses for a key (murmur2, positive part)."""
    return int((murmur2(key) & 0x7FFFFFFF) % num_partitions)


def headers_to_json(headers: Headers) -> str:
    """Headers as stored in SQLite and Postgres: a JSON list of [name, base64 of the value or null], in order."""
    return json.dumps([[name, None if value is None else base64.b64encode(value).decode()] for name, value in headers])


def headers_from_json(text: str) -> Headers:
    """The inverse of ``headers_to_json``."""
    return tuple((name, None if value is None else base64.b64decode(value)) for name, value in json.loads(text))
