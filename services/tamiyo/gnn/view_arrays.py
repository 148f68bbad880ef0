"""Turns a graph view into arrays: the features that the network reads, and their encoding.

The features are those of ``esper.graph.view_features`` without ids and without counters from the start of a run, so
that a policy cannot distinguish runs. Every number is encoded as sign(x) log(1 + |x|) with a flag for whether it is
known.

L: layers, S: seeds, K: kernels, E: edges.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esper.graph.graph_view import GraphView
from esper.graph.view_features import FEATURES, VOCABULARIES, Feature, Kind, Level
from esper.services.tamiyo.control.legal_choices import Indices, LegalChoices, SingleChoice, category_codes

Floats = NDArray[np.float32]

NUM_RECENT = 4
"""Number of the newest gains of the metric that are features."""

_NUMBERS = (Kind.COUNT, Kind.REAL)
_TIME_COUNTERS = frozenset(
    {"incarnation", "boundary", "step", "epoch", "window_step", "since_step", "germinated_at_step", "steps_since_start"}
)


def _split(level: Level) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    features = FEATURES[level]
    numbers = tuple(f for f in features if f.kind in _NUMBERS and f.name not in _TIME_COUNTERS)
    return numbers, tuple(f for f in features if f.kind is Kind.CATEGORY)


_READ = {level: _split(level) for level in (Level.RUN, Level.LAYER, Level.SEED, Level.KERNEL)}
_DERIVED: Mapping[Level, tuple[str, ...]] = MappingProxyType(
    {Level.LAYER: ("share_of_host", "num_sources", "num_targets"), Level.KERNEL: ("share_of_host",)}
)
"""Further numbers: parameters as a share of the whole host's, and the in- and out-degree of a layer."""
_HISTORY = ("metric", *(f"gain_{n}_ago" for n in range(NUM_RECENT)), "plateau", "best_gap")


def input_names(level: Level) -> tuple[str, ...]:
    """Return the names of a level's columns. A policy's file records those that it was trained on."""
    numbers, categories = _READ[level]
    names = [*(f.name for f in numbers), *_DERIVED.get(level, ())]
    if level is Level.RUN:
        names += _HISTORY
    words = [f"{f.name}={word}" for f in categories for word in VOCABULARIES[f.name]]
    return (*names, *(f"{n} is known" for n in names), *words)


@dataclass(frozen=True, slots=True)
class ViewArrays:
    """The arrays of one view.

    Attributes:
        run: (1, F_run) float32; layers: (L, F_layer); seeds: (S, F_seed); kernels: (K, F_kernel).
        blueprints: the blueprint of each kernel.
        edges: (2, E) int64, from row to row of ``layers``.
        choices: all legal choices, or the single one to score.
    """

    run: Floats
    layers: Floats
    seeds: Floats
    kernels: Floats
    blueprints: tuple[str, ...]
    edges: Indices
    choices: LegalChoices | SingleChoice


def read_view(view: GraphView, metric: str, choices: LegalChoices | SingleChoice | None = None) -> ViewArrays:
    """Return the arrays of a view.

    Args:
        metric: the metric whose history is part of the run's features.
        choices: the choices to score; by default all legal ones.
    """
    layers, seeds, kernels = (view.columns[level] for level in (Level.LAYER, Level.SEED, Level.KERNEL))
    choices = LegalChoices(view) if choices is None else choices
    edges = category_codes(list(chain.from_iterable(view.edges)), view.layer_rows).reshape(-1, 2)
    host = max(1, sum(layers["num_parameters"]))
    degrees = [np.bincount(edges[:, end], minlength=len(view.layer_rows)).astype(np.float64) for end in (1, 0)]
    return ViewArrays(
        run=_run(view, metric),
        layers=_array(Level.LAYER, layers, _share(layers, host), *degrees),
        seeds=_array(Level.SEED, seeds),
        kernels=_array(Level.KERNEL, kernels, _share(kernels, host)),
        blueprints=tuple(kernels["blueprint_id"]),
        edges=np.ascontiguousarray(edges.T),
        choices=choices,
    )


def _share(columns: Mapping[str, Sequence[Any]], of: int) -> NDArray[np.float64]:
    return np.array(columns["num_parameters"], dtype=np.float64) / of


def _array(level: Level, columns: Mapping[str, Sequence[Any]], *derived: NDArray[np.float64]) -> Floats:
    numbers, categories = _READ[level]
    parts = [*_known(np.stack([*(_floats(columns[f.name]) for f in numbers), *derived]))]
    parts += [_one_hot(f.name, columns[f.name]) for f in categories]
    rows: Floats = np.ascontiguousarray(np.concatenate(parts).T)
    return rows


def _floats(values: Sequence[Any]) -> NDArray[np.float64]:
    """Return (N,) with NaN for None. Columns without None, as most are, take a fifth of the time."""
    try:
        return np.array(array("d", values))
    except TypeError:
        return np.fromiter(values, dtype=object, count=len(values)).astype(np.float64)


def _known(values: NDArray[np.float64]) -> tuple[Floats, Floats]:
    """Return the encoded numbers, 0 if unknown, and the flags for known ones, (F, N) each."""
    known = ~np.isnan(values)
    size = torch.from_numpy(np.abs(values)).log1p_().numpy()  # numpy takes three times as long
    numbers = np.copysign(size, values).astype(np.float32)
    numbers[~known] = 0.0
    return numbers, known.astype(np.float32)


def _one_hot(name: str, words: Sequence[str | None]) -> Floats:
    """Return a one-hot encoding, (V, N); None gives zeros."""
    codes: dict[str | None, int] = {word: n for n, word in enumerate(VOCABULARIES[name])}
    found = category_codes(words, {**codes, None: -1})
    hot: Floats = (found == np.arange(len(codes))[:, None]).astype(np.float32)
    return hot


def _run(view: GraphView, metric: str) -> Floats:
    numbers, _categories = _READ[Level.RUN]
    values = [float("nan") if (v := getattr(view, f.name)) is None else float(v) for f in numbers]
    column = np.array([*values, *_history(view, metric)], dtype=np.float64)[:, None]
    row: Floats = np.ascontiguousarray(np.concatenate(_known(column)).T)
    return row


def _history(view: GraphView, metric: str) -> list[float]:
    """Return the metric, its newest gains, the gain of the last 3 epochs over the best before, the gap to the best."""
    values = [float(v) for e in view.epochs if (v := e.metrics.get(metric)) is not None]
    gains = [b - a for a, b in pairwise(values)][::-1][:NUM_RECENT]
    unknown = float("nan")
    recent = [*gains, *[unknown] * (NUM_RECENT - len(gains))]
    if not values:
        return [unknown] * len(_HISTORY)
    plateau = max(values[-3:]) - max(values[:-3]) if len(values) > 3 else unknown
    return [values[-1], *recent, plateau, max(values) - values[-1]]
