"""A cache bounded in bytes: the least recently used values are dropped first."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """Values by key.

    Args:
        max_bytes: of all values together.
        max_value_bytes: a larger value is not kept.
    """

    def __init__(self, max_bytes: int, max_value_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._max_value_bytes = max_value_bytes
        self._items: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value, which becomes the most recently used."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keep a value of this size in place of the one before."""
        self.pop(key)
        if num_bytes > self._max_value_bytes:
            return
        self._items[key] = value, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            self.pop(next(iter(self._items)))

    def pop(self, key: Key) -> Value | None:
        """Remove a value and return it; None where it is not kept."""
        value, num_bytes = self._items.pop(key, (None, 0))
        self.num_bytes -= num_bytes
        return value
