"""A view's layers, seeds and kernels as objects over its columns, each made when it is looked at.

A wide model has thousands of seeds, and who learns reads columns. To make all objects takes ten times as long as to
read a view's bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar, overload

from esper.graph.encoding import Columns
from esper.graph.features import FEATURES, Kind, Level
from esper.schemas.enums import BreakerState, LayerKind, SeedStage

T = TypeVar("T")

_VOCABULARIES: Mapping[Level, Mapping[str, type[StrEnum]]] = MappingProxyType(
    {
        Level.LAYER: {"kind": LayerKind},
        Level.SEED: {"stage": SeedStage, "breaker": BreakerState},
        Level.KERNEL: {"target": LayerKind},
    }
)


class Objects(Sequence[T]):
    """Looks like the tuple of a level's objects, and is equal to it.

    Args:
        made: makes one, of its fields.
        columns: what the bytes hold, a list of N values for each feature of the level.

    Raises:
        ValueError: a category has a word that is not in its vocabulary.
        TypeError: a word is no text.
    """

    def __init__(self, made: Callable[..., T], level: Level, columns: Columns) -> None:
        for name, words in _VOCABULARIES[level].items():
            if unknown := set(columns[name]) - {*words, None}:
                raise ValueError(f"{unknown.pop()!r} is no {words.__name__}")
        self.columns = columns
        self._made, self._level = made, level

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice) or "_all" in self.__dict__:
            return self._all[index]
        place = range(len(self))[index]
        one = {name: values[place : place + 1] for name, values in self.columns.items()}
        return objects_of(self._made, self._level, one)[0]

    def __iter__(self) -> Iterator[T]:
        return iter(self._all)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        return repr(self._all)

    @cached_property
    def _all(self) -> tuple[T, ...]:
        return objects_of(self._made, self._level, self.columns)


def objects_of(made: Callable[..., T], level: Level, columns: Columns) -> tuple[T, ...]:
    """All objects of one level, from its columns."""
    fields: dict[str, Sequence[Any]] = {}
    parts: dict[str, dict[str, Sequence[Any]]] = {}
    for feature in FEATURES[level]:
        name, key = feature.place
        values = columns[feature.name]
        words = _VOCABULARIES.get(level, {}).get(feature.name)
        if words is not None:
            values = [None if v is None else words(v) for v in values]
        elif feature.kind is Kind.MAP:
            values = [v or {} for v in values]
        if key is None:
            fields[name] = values
        else:
            parts.setdefault(name, {})[key] = values
    for name, by_key in parts.items():
        fields[name] = [dict(zip(by_key, row, strict=True)) for row in zip(*by_key.values(), strict=True)]
    return tuple(made(**dict(zip(fields, row, strict=True))) for row in zip(*fields.values(), strict=True))
