"""A view's bytes: columns as ``esper.graph.features`` declares them, in canonical JSON.

Views lie in the log for ever. So a form, once written, is read for ever: an older one by its
upcaster below, one version after the other; a newer one is refused, never guessed at.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import msgspec

from esper.errors import ContractError, NewerVersionError
from esper.graph.features import FEATURES, VIEW_VERSION, Level, value_of
from esper.graph.health_windows import FIELDS

_ENCODER = msgspec.json.Encoder(order="sorted")  # a tenth of what json takes, which is half of a view

Columns = dict[str, Sequence[Any]]
Form = dict[str, Any]

TABLES: Mapping[Level, str] = MappingProxyType(
    {
        Level.LAYER: "layers",
        Level.EDGE: "edges",
        Level.SEED: "seeds",
        Level.EPOCH: "epochs",
        Level.KERNEL: "kernels",
    }
)
"""Where the columns of each level lie, beside the features of the run. Also the fields of a view."""


def encode(view: Any) -> bytes:
    """The bytes of a ``GraphView``. Numbers in their shortest exact form: equal views have equal bytes."""
    form: Form = {f.name: value_of(view, f) for f in FEATURES[Level.RUN]}
    form["view_version"] = VIEW_VERSION
    form["edges"] = {"source": [s for s, _t in view.edges], "target": [t for _s, t in view.edges]}
    for level, table in TABLES.items():
        if level is not Level.EDGE:
            form[table] = view.columns[level]
    return _ENCODER.encode(form)


def columns_of(level: Level, things: Sequence[Any]) -> Columns:
    """``value_of`` each thing and feature, a column at a time: views have thousands of seeds."""
    found: Columns = {}
    fields: dict[str, Sequence[Any]] = {}
    for feature in FEATURES[level]:
        name, key = feature.place
        if name not in fields:
            fields[name] = list(map(attrgetter(name), things))
        found[feature.name] = fields[name] if key is None else [value.get(key) for value in fields[name]]
    return found


def decode(data: bytes) -> dict[Level, Columns]:
    """The columns in a view's bytes, as the newest version has them; a run's have one value each.

    Raises:
        ContractError: these are no view's bytes.
        NewerVersionError: a newer program wrote them.
    """
    form = _parsed(data)
    version = form["view_version"]
    if version > VIEW_VERSION:
        raise NewerVersionError(f"a view of version {version}: this program reads up to {VIEW_VERSION}; upgrade it")
    try:
        for older in range(version, VIEW_VERSION):
            form = _UPCASTERS[older](form)
        found: dict[Level, Columns] = {Level.RUN: {f.name: [form[f.name]] for f in FEATURES[Level.RUN]}}
        for level, table in TABLES.items():
            found[level] = {f.name: form[table][f.name] for f in FEATURES[level]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ContractError(f"no view of version {version}: {error!r}") from error
    for level, columns in found.items():
        if len({len(values) for values in columns.values()}) > 1:
            raise ContractError(f"no view of version {version}: its {level} columns differ in length")
    return found


def _parsed(data: bytes) -> Form:
    try:
        form = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"no view: {error}") from error
    version = form.get("view_version") if isinstance(form, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ContractError("no view: it has no view_version")
    return dict(form)


def _from_1(form: Form) -> Form:
    """Version 1 had an object for each layer, seed, epoch and kernel, and half of the features."""
    newest: Form = {f.name: form.get(f.name) for f in FEATURES[Level.RUN]}
    newest["num_epochs"] = len(form["epochs"])  # it held all of them
    newest["edges"] = {"source": [e[0] for e in form["edges"]], "target": [e[1] for e in form["edges"]]}
    for level, table in TABLES.items():
        if level is not Level.EDGE:
            things = [{**t, **{name: t.get("health", {}).get(name) for name in FIELDS}} for t in form[table]]
            newest[table] = {f.name: [t[f.name] if f.since == 1 else t.get(f.name) for t in things]
                             for f in FEATURES[level]}  # fmt: skip
    return newest


_UPCASTERS: Mapping[int, Callable[[Form], Form]] = MappingProxyType({1: _from_1})
"""Version -> what makes the next one's form of it. None is ever deleted."""
