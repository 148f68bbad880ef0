"""A view's layers, seeds and kernels as objects over its columns, each made when it is looked at.

A wide model has thousands of seeds, and who learns reads columns. To make all objects takes ten times as long as to
read a view's bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar, overload

from esper.graph.features import FEATURES, VOCABULARIES, Feature, Kind, Level
from esper.graph.view_encoding import Columns

T = TypeVar("T")


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
        for feature in FEATURES[level]:
            if feature.kind is Kind.CATEGORY:
                words = VOCABULARIES[feature.name]
                known = {*words, None} if feature.is_nullable else {*words}
                if unknown := set(columns[feature.name]) - known:
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
        return object_of(self._made, self._level, self.columns, range(len(self))[index])

    def __iter__(self) -> Iterator[T]:
        return iter(self._all)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | Objects) else NotImplemented

    def __repr__(self) -> str:
        return repr(self._all)

    @cached_property
    def _all(self) -> tuple[T, ...]:
        return tuple(object_of(self._made, self._level, self.columns, n) for n in range(len(self)))


def object_of(made: Callable[..., T], level: Level, columns: Columns, row: int) -> T:
    """The object of one row of a level's columns."""
    fields: dict[str, Any] = {}
    for column, name, key, form in _LAYOUT[level]:
        value = columns[column][row]
        if form is not None:
            value = form(value)
        if key is None:
            fields[name] = value
        else:
            fields.setdefault(name, {})[key] = value
    return made(**fields)


def _form(feature: Feature) -> Callable[[Any], Any] | None:
    """What makes a field's value of a column's; None where they are the same."""
    if feature.kind is Kind.CATEGORY:
        words = VOCABULARIES[feature.name]
        return lambda value: None if value is None else words(value)
    return (lambda value: value or {}) if feature.kind is Kind.MAP else None


_LAYOUT = {level: [(f.name, *f.place, _form(f)) for f in features] for level, features in FEATURES.items()}
