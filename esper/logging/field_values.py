"""Values of log fields: copied on the caller's thread, masked on the writer thread.

Invariant: a snapshot is immutable in effect, holds only built-in types, and is bounded in size, for
any input.
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
MAX_VALUES = 500  # over all containers of one field; copying more would slow a training step
MAX_TEXT_CHARS = 16_000
OVERLAP_CHARS = 4_000  # longer than any secret: text is masked before it is cut, so no secret is cut in two
MAX_BITS = 4_096  # of an integer: Python refuses to format much longer ones
TRUNCATED = "..."

CONSTANTS = frozenset(
    {str, int, float, bool, type(None), bytes, UUID, datetime, date, time, timedelta, Decimal, PosixPath}
)
"""Immutable types: their values are queued without a copy."""


def snapshot(value: Any) -> Any:
    """A copy of ``value``: constants, dicts and lists of them, and text for everything else."""
    return value if type(value) in CONSTANTS else _Copier().copy(value, MAX_DEPTH)


def redact(value: Any, name: str = "") -> Any:
    """``value`` with all secrets masked, ready for JSON. ``name`` is the field's name, if it has one."""
    return mask_snapshot(snapshot(value), name)


def mask_snapshot(value: Any, name: str = "") -> Any:
    """Like ``redact``, for a snapshot."""
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
    """``text`` with secrets masked, truncated to ``MAX_TEXT_CHARS``."""
    if len(text) <= MAX_TEXT_CHARS:
        return mask_text(text)
    return mask_text(text[: MAX_TEXT_CHARS + OVERLAP_CHARS])[:-OVERLAP_CHARS] + TRUNCATED


class _Copier:
    """Copies one field's value, within a budget of ``MAX_VALUES`` values."""

    def __init__(self) -> None:
        self._num_left = MAX_VALUES

    def copy(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in CONSTANTS:
            return value
        if isinstance(value, (SecretStr, SecretBytes)):
            return MASK
        if depth == 0:
            return TRUNCATED
        try:
            return self._convert(value, depth)
        except Exception:  # raised by the value's own methods
            return f"<unprintable {kind.__name__}>"

    def _convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, enum.Enum):
            return self.copy(value.value, depth - 1)
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
            return self._copy_pairs(pairs, depth)
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._copy_items(value, depth)
        return repr(value)[: MAX_TEXT_CHARS + OVERLAP_CHARS]

    def _copy_pairs(self, pairs: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        copy = {}
        for key, value in pairs:
            if not self._take():
                copy[TRUNCATED] = TRUNCATED
                break
            copy[key if type(key) is str else str(self.copy(key, depth - 1))] = self.copy(value, depth - 1)
        return copy

    def _copy_items(self, items: Iterable[Any], depth: int) -> list[Any]:
        copy = []
        for item in items:
            if not self._take():
                copy.append(TRUNCATED)
                break
            copy.append(self.copy(item, depth - 1))
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
    """Masks items, including those that follow a secret's name: ["--password", x], ("Authorization", x)."""
    masked, is_secret = [], False
    for item in items:
        masked.append(MASK if is_secret and item is not None else mask_snapshot(item))
        is_secret = isinstance(item, (str, bytes)) and announces_secret(_text(item))
    return masked


def _text(item: str | bytes) -> str:
    return item if isinstance(item, str) else item.decode(errors="backslashreplace")
