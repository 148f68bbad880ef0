"""Values in log fields: copied on the caller's thread, freed of secrets on the writer's.

Invariant: what ``snapshot`` gives back no longer changes, holds no object with code of its own,
and is bounded in size, whatever it was given.
"""

import dataclasses
import enum
import math
import numbers
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PosixPath
from typing import Any
from uuid import UUID

from pydantic import BaseModel, SecretBytes, SecretStr

from esper.redaction import MASK, announces_secret, is_secret_name, mask_text

MAX_DEPTH = 8
MAX_VALUES = 500  # in all the containers of one field; a copy of more would be felt in a training step
MAX_TEXT_CHARS = 16_000
OVERLAP_CHARS = 4_000  # longer than a secret: text is masked before the cut, and none is cut in two
MAX_BITS = 4_096  # of an integer: Python refuses to write out much longer ones
LEFT_OUT = "..."

CONSTANTS = frozenset(
    {str, int, float, bool, type(None), bytes, UUID, datetime, date, time, timedelta, Decimal, PosixPath}
)
"""Types whose values cannot change: they go to the writer as they are."""


def snapshot(value: Any) -> Any:
    """``value`` as it is now: constants, dicts and lists of them, and text for everything else."""
    return value if type(value) in CONSTANTS else _Copy().of(value, MAX_DEPTH)


def redact(value: Any, name: str = "") -> Any:
    """``value`` with everything masked that is, or holds, a secret; ready for JSON."""
    return mask_snapshot(snapshot(value), name)


def mask_snapshot(value: Any, name: str = "") -> Any:
    """The same for what ``snapshot`` gave."""
    if value is None or isinstance(value, bool):
        return value
    if name and is_secret_name(name):
        return MASK
    if isinstance(value, dict):
        return {masked_text(str(key)): mask_snapshot(v, str(key)) for key, v in value.items()}
    if isinstance(value, list):
        return _masked_list(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no NaN
    if isinstance(value, int):
        return value if value.bit_length() <= MAX_BITS else f"an integer of {value.bit_length()} bits"
    return masked_text(value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value))


def masked_text(text: str) -> str:
    """``text`` without secrets, cut where it is very long."""
    if len(text) <= MAX_TEXT_CHARS:
        return mask_text(text)
    return mask_text(text[: MAX_TEXT_CHARS + OVERLAP_CHARS])[:-OVERLAP_CHARS] + LEFT_OUT


class _Copy:
    """One copy, with a budget."""

    def __init__(self) -> None:
        self._num_left = MAX_VALUES

    def of(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in CONSTANTS:
            return value
        if isinstance(value, (SecretStr, SecretBytes)):
            return MASK
        if depth == 0:
            return LEFT_OUT
        try:
            return self._of_other(value, depth)
        except Exception:  # code of the value's own
            return f"<unprintable {kind.__name__}>"

    def _of_other(self, value: Any, depth: int) -> Any:
        if isinstance(value, enum.Enum):
            return self.of(value.value, depth - 1)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, (bytearray, memoryview)):
            return bytes(value[:MAX_TEXT_CHARS])
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        pairs = _pairs_of(value)
        if pairs is not None:
            return self._of_pairs(pairs, depth)
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._of_items(value, depth)
        return repr(value)[: MAX_TEXT_CHARS + OVERLAP_CHARS]

    def _of_pairs(self, pairs: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        copy = {}
        for key, value in pairs:
            if not self._take():
                copy[LEFT_OUT] = LEFT_OUT
                break
            copy[key if type(key) is str else str(self.of(key, depth - 1))] = self.of(value, depth - 1)
        return copy

    def _of_items(self, items: Iterable[Any], depth: int) -> list[Any]:
        copy = []
        for item in items:
            if not self._take():
                copy.append(LEFT_OUT)
                break
            copy.append(self.of(item, depth - 1))
        return copy

    def _take(self) -> bool:
        self._num_left -= 1
        return self._num_left >= 0


def _pairs_of(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, BaseModel):
        hidden = {name for name, field in type(value).model_fields.items() if not field.repr}
        held = {**value.__dict__, **(value.__pydantic_extra__ or {})}
        return [(name, v) for name, v in held.items() if name not in hidden]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    return None


def _masked_list(items: list[Any]) -> list[Any]:
    """Items, without those that follow a secret's name: ["--password", x], ("Authorization", x)."""
    masked, is_secret = [], False
    for item in items:
        masked.append(MASK if is_secret and item is not None else mask_snapshot(item))
        is_secret = isinstance(item, (str, bytes)) and announces_secret(_text(item))
    return masked


def _text(item: str | bytes) -> str:
    return item if isinstance(item, str) else item.decode(errors="backslashreplace")
