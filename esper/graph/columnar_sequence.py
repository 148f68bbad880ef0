"""A sequence of a view's layers, seeds or kernels over their columns, which creates its objects on access.

A wide model has thousands of seeds, and a GNN reads columns alone. Creating all objects takes ten times as long as
decoding a view's bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar, overload

from esper.graph.view_bytes import Columns
from esper.graph.view_features import FEATURES, VOCABULARIES, Feature, Kind, Level

T = TypeVar("T")


class ColumnarSequence(Sequence[T]):
    """Behaves like the tuple of a level's objects, and is equal to it.

    Args:
        factory: creates an object from its fields.
        columns: N values for each feature of the level.

    Raises:
        ValueError: a category column has a value that is not in its vocabulary.
        TypeError: a value of a category column is not hashable.
    """

    def __init__(self, factory: Callable[..., T], level: Level, columns: Columns) -> None:
        for feature in FEATURES[level]:
            if feature.kind is Kind.CATEGORY:
                words = VOCABULARIES[feature.name]
                known = {*words, None} if feature.is_nullable else {*words}
                if unknown := set(columns[feature.name]) - known:
                    raise ValueError(f"{feature.name}: {unknown.pop()!r} is not a {words.__name__}")
        self.columns = columns
        self._factory, self._level = factory, level

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice) or "_all" in self.__dict__:
            return self._all[index]
        return _object_at(self._factory, self._level, self.columns, range(len(self))[index])

    def __iter__(self) -> Iterator[T]:
        return iter(self._all)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | ColumnarSequence) else NotImplemented

    def __repr__(self) -> str:
        return repr(self._all)

    @cached_property
    def _all(self) -> tuple[T, ...]:
        return tuple(_object_at(self._factory, self._level, self.columns, n) for n in range(len(self)))


def _object_at(factory: Callable[..., T], level: Level, columns: Columns, row: int) -> T:
    fields: dict[str, Any] = {}
    for column, name, key, convert in _LAYOUT[level]:
        value = columns[column][row]
        if convert is not None:
            value = convert(value)
        if key is None:
            fields[name] = value
        else:
            fields.setdefault(name, {})[key] = value
    return factory(**fields)


def _converter(feature: Feature) -> Callable[[Any], Any] | None:
    """The function that converts a column's value to the field's; None where they are the same."""
    if feature.kind is Kind.CATEGORY:
        words = VOCABULARIES[feature.name]
        return lambda value: None if value is None else words(value)
    return (lambda value: value or {}) if feature.kind is Kind.MAP else None


_LAYOUT = {
    level: [(f.name, *f.attribute_path, _converter(f)) for f in features] for level, features in FEATURES.items()
}
