"""What can be chosen at a boundary: WAIT, or one action for one seed.

A wide model has tens of thousands of choices. So they are kept as columns, and one becomes an object
when it is looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from esper.graph.features import Level
from esper.graph.graph_view import GraphView, KernelView, SeedView
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.schemas.lifecycle import ACTIVE_STAGES

Indices = NDArray[np.int64]

_STAGES = {stage: n for n, stage in enumerate(SeedStage)}
_NUM_ENDS: Indices = np.array([(s in ACTIVE_STAGES) + (s is SeedStage.EVALUATING) for s in SeedStage], dtype=np.int64)
"""Choices that a seed of each stage has to end: culling what is under way, and making permanent what is judged."""

END_STAGES = (Action.CULL, Action.FOSSILIZE)
"""What can end what is under way in a seed, in the order of its choices."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing to do. ``kernel`` goes with GERMINATE alone, ``seed`` with all but WAIT."""

    action: Action
    seed: SeedView | None = None
    kernel: KernelView | None = None


WAIT = Choice(Action.WAIT)


class LegalChoices(Sequence[Choice]):
    """Everything that the lifecycle and the kernels at hand allow; WAIT is the first.

    After it come those of each seed, in the view's order: a dormant seed's kernels that fit, in the
    view's order; of one that is under way its end, and in EVALUATING also its permanence.

    C: choices, S: seeds, L: layers.

    Attributes:
        first: (S,) int64, the place of each seed's first choice.
        fitting: for each way to fit (kind and width of a layer) the kernels, as indices.
        fit: (S,) int64, the way of each dormant seed's layer; -1 for other seeds.
        seed_layer: (S,) int64, the layer of each seed.
    """

    def __init__(self, view: GraphView) -> None:
        self._view = view
        layers, seeds, fitted = (view.columns[level] for level in (Level.LAYER, Level.SEED, Level.KERNEL))
        ways: dict[tuple[LayerKind, int], int] = {}
        found = [ways.setdefault(way, len(ways)) for way in zip(layers["kind"], layers["num_features"], strict=True)]
        kernels: list[list[int]] = [[] for _way in ways]
        for n, fits in enumerate(zip(fitted["target"], fitted["num_features"], strict=True)):
            if (way := ways.get(fits)) is not None:
                kernels[way].append(n)
        self.fitting = tuple(np.array(those, dtype=np.int64) for those in kernels)
        stages = codes_of(seeds["stage"], _STAGES)
        is_dormant = stages == _STAGES[SeedStage.DORMANT]
        self.seed_layer = codes_of(seeds["layer_id"], view.layer_rows)
        of_layer = np.array(found, dtype=np.int64)[self.seed_layer]
        sizes = np.array([len(those) for those in kernels], dtype=np.int64)
        self.fit: Indices = np.where(is_dormant, of_layer, -1)
        self._counts: Indices = np.where(is_dormant, sizes[of_layer] if len(sizes) else 0, _NUM_ENDS[stages])
        self.first: Indices = 1 + np.cumsum(self._counts) - self._counts

    def __len__(self) -> int:
        return 1 + int(self._counts.sum())

    @overload
    def __getitem__(self, index: int) -> Choice: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Choice]: ...
    def __getitem__(self, index: int | slice) -> Choice | Sequence[Choice]:
        if isinstance(index, slice):
            return tuple(self)[index]
        action, seed, kernel = self.at(index)
        if seed is None:
            return WAIT
        return Choice(action, self._view.seeds[seed], None if kernel is None else self._view.kernels[kernel])

    def __iter__(self) -> Iterator[Choice]:
        kernels = tuple(self._view.kernels)
        yield WAIT
        for seed, way, count in zip(self._view.seeds, self.fit.tolist(), self._counts.tolist(), strict=True):
            if way < 0:
                yield from (Choice(action, seed) for action in END_STAGES[:count])
            else:
                yield from (Choice(Action.GERMINATE, seed, kernels[n]) for n in self.fitting[way].tolist())

    def at(self, index: int) -> tuple[Action, int | None, int | None]:
        """One choice: its action, the index of its seed and that of its kernel.

        Raises:
            IndexError: there are fewer.
        """
        index = range(len(self))[index]
        if index == 0:
            return Action.WAIT, None, None
        seed = int(self.first.searchsorted(index, side="right")) - 1
        way, place = self.fit[seed], index - int(self.first[seed])
        return (END_STAGES[place], seed, None) if way < 0 else (Action.GERMINATE, seed, int(self.fitting[way][place]))

    def ends(self, action: Action) -> tuple[Indices, Indices]:
        """(N,), (N,): the seeds that an end is open to, and the place of that choice."""
        place = END_STAGES.index(action)
        seeds = np.flatnonzero((self.fit < 0) & (self._counts > place))
        return seeds, self.first[seeds] + place


class SingleChoice:
    """One of the legal choices, by itself, with the same columns: to learn from what was chosen."""

    def __init__(self, choices: LegalChoices, index: int) -> None:
        self._action, seed, kernel = choices.at(index)
        self._seeds: Indices = np.array([] if seed is None else [seed], dtype=np.int64)
        self.seed_layer = choices.seed_layer
        self.fit: Indices = np.full(len(choices.fit), -1, dtype=np.int64)
        self.first: Indices = np.zeros(len(choices.fit), dtype=np.int64)
        self.fitting: tuple[Indices, ...] = ()
        if kernel is not None:
            self.fit[seed] = 0
            self.fitting = (np.array([kernel], dtype=np.int64),)

    def __len__(self) -> int:
        return 1

    def ends(self, action: Action) -> tuple[Indices, Indices]:
        """As those of all choices."""
        seeds = self._seeds if action is self._action else self._seeds[:0]
        return seeds, np.zeros_like(seeds)


def codes_of(names: Sequence[Any], codes: Mapping[Any, int]) -> Indices:
    """(N,): the number of each name. Views have thousands of them, so it takes them without a line of Python each.

    Raises:
        KeyError: one has no number.
    """
    return np.fromiter(map(codes.__getitem__, names), dtype=np.int64, count=len(names))


def legal_choices(view: GraphView) -> LegalChoices:
    """All legal choices of a view, always in one order."""
    return LegalChoices(view)
