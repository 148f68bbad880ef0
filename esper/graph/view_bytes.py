"""The bytes of a view: the columns that ``esper.graph.view_features`` declares, in canonical JSON.

Invariant: views stay in the log forever, so every version stays readable. Older versions are read through the
upcasters below, one version after the other; a newer version is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import msgspec

from esper.errors import ContractError, NewerVersionError
from esper.graph.health_windows import FIELDS
from esper.graph.view_features import FEATURES, VIEW_VERSION, Level, value_of

# Ten times as fast as json, with which encoding took half of the time of a view.
_ENCODER = msgspec.json.Encoder(order="sorted")

Columns = dict[str, Sequence[Any]]
Document = dict[str, Any]

TABLES: Mapping[Level, str] = MappingProxyType(
    {
        Level.LAYER: "layers",
        Level.EDGE: "edges",
        Level.SEED: "seeds",
        Level.EPOCH: "epochs",
        Level.KERNEL: "kernels",
    }
)
"""Level -> the key of its columns in the JSON document, which is also the attribute of a ``GraphView``."""


def encode(view: Any) -> bytes:
    """Encode a ``GraphView``. Numbers have their shortest exact form, so that equal views have equal bytes."""
    document: Document = {f.name: value_of(view, f) for f in FEATURES[Level.RUN]}
    document["view_version"] = VIEW_VERSION
    document["edges"] = {"source": [s for s, _t in view.edges], "target": [t for _s, t in view.edges]}
    for level, table in TABLES.items():
        if level is not Level.EDGE:
            document[table] = view.columns[level]
    return _ENCODER.encode(document)


def columns_of(level: Level, objects: Sequence[Any]) -> Columns:
    """``value_of`` each object and feature, one column at a time, since views have thousands of seeds."""
    found: Columns = {}
    fields: dict[str, Sequence[Any]] = {}
    for feature in FEATURES[level]:
        name, key = feature.attribute_path
        if name not in fields:
            fields[name] = list(map(attrgetter(name), objects))
        found[feature.name] = fields[name] if key is None else [value.get(key) for value in fields[name]]
    return found


def decode(data: bytes) -> dict[Level, Columns]:
    """Decode a view's bytes into the columns of the newest version. Columns of the run have one value each.

    Raises:
        ContractError: ``data`` is not a view.
        NewerVersionError: a newer program wrote the view.
    """
    document = _parsed(data)
    version = document["view_version"]
    if version > VIEW_VERSION:
        raise NewerVersionError(f"graph view of version {version}: this program reads up to {VIEW_VERSION}; upgrade it")
    try:
        for older in range(version, VIEW_VERSION):
            document = _UPCASTERS[older](document)
        found: dict[Level, Columns] = {Level.RUN: {f.name: [document[f.name]] for f in FEATURES[Level.RUN]}}
        for level, table in TABLES.items():
            found[level] = {f.name: document[table][f.name] for f in FEATURES[level]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ContractError(f"not a graph view of version {version}: {error!r}") from error
    for level, columns in found.items():
        if len({len(values) for values in columns.values()}) > 1:
            raise ContractError(f"not a graph view of version {version}: its {level} columns differ in length")
    return found


def _parsed(data: bytes) -> Document:
    try:
        document = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"not a graph view: {error}") from error
    version = document.get("view_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ContractError("not a graph view: view_version is missing or not a positive integer")
    return dict(document)


def _from_1(document: Document) -> Document:
    """Convert version 1, which had an object for each layer, seed, epoch and kernel, and half of the features."""
    newest: Document = {f.name: document.get(f.name) for f in FEATURES[Level.RUN]}
    newest["num_epochs"] = len(document["epochs"])  # version 1 held all epochs
    newest["edges"] = {"source": [e[0] for e in document["edges"]], "target": [e[1] for e in document["edges"]]}
    for level, table in TABLES.items():
        if level is not Level.EDGE:
            objects = [{**t, **{name: t.get("health", {}).get(name) for name in FIELDS}} for t in document[table]]
            newest[table] = {f.name: [t[f.name] if f.since == 1 else t.get(f.name) for t in objects]
                             for f in FEATURES[level]}  # fmt: skip
    return newest


_UPCASTERS: Mapping[int, Callable[[Document], Document]] = MappingProxyType({1: _from_1})
"""Version -> the function that converts it to the next one. An upcaster is never deleted."""
