"""What can be chosen at a boundary: WAIT, or one action for one seed.

A wide model has tens of thousands of choices. So they are kept as columns, and one becomes an object
when it is looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from esper.graph.features import Level
from esper.graph.view import GraphView, KernelView, SeedView
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.schemas.lifecycle import ACTIVE_STAGES

Indices = NDArray[np.int64]

_STAGES = {stage: n for n, stage in enumerate(SeedStage)}
_NUM_ENDS: Indices = np.array([(s in ACTIVE_STAGES) + (s is SeedStage.EVALUATING) for s in SeedStage], dtype=np.int64)
"""Choices that a seed of each stage has to end: culling what is under way, and making permanent what is judged."""

ACTIONS = (Action.WAIT, Action.GERMINATE, Action.CULL, Action.FOSSILIZE)
"""A choice's action is an index into these."""


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
        action, seed, kernel: (C,) int64; -1 where a choice has no seed or no kernel.
        first: (S,) int64, the place of each seed's first choice.
        fitting: for each way to fit (kind and width of a layer) the kernels, as indices.
        fit: (S,) int64, the way of each dormant seed's layer; -1 for other seeds.
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
        num_ends = _NUM_ENDS[stages]
        of_layer = codes_of(seeds["layer_id"], dict(zip(layers["layer_id"], found, strict=True)))
        sizes = np.array([len(those) for those in kernels], dtype=np.int64)
        self.fit: Indices = np.where(is_dormant, of_layer, -1)
        self._counts: Indices = np.where(is_dormant, sizes[of_layer] if len(sizes) else 0, num_ends)
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
        seed, kernel = int(self.seed[index]), int(self.kernel[index])
        if seed < 0:
            return WAIT
        view = self._view
        return Choice(ACTIONS[self.action[index]], view.seeds[seed], view.kernels[kernel] if kernel >= 0 else None)

    def __iter__(self) -> Iterator[Choice]:
        seeds, kernels = tuple(self._view.seeds), tuple(self._view.kernels)
        columns = (self.action.tolist(), self.seed.tolist(), self.kernel.tolist())
        for action, seed, kernel in zip(*columns, strict=True):
            yield Choice(ACTIONS[action], seeds[seed], kernels[kernel] if kernel >= 0 else None) if seed >= 0 else WAIT

    @cached_property
    def seed(self) -> Indices:
        """See the class."""
        return np.concatenate([[-1], np.repeat(np.arange(len(self.fit)), self._counts)])

    @cached_property
    def _place(self) -> Indices:
        """(C,): the place among its seed's choices."""
        return np.concatenate([[0], np.arange(1, len(self)) - np.repeat(self.first, self._counts)])

    @cached_property
    def action(self) -> Indices:
        """See the class."""
        germinate, cull, fossilize = (ACTIONS.index(a) for a in (Action.GERMINATE, Action.CULL, Action.FOSSILIZE))
        fit = np.repeat(self.fit, self._counts)
        of_seeds = np.where(fit >= 0, germinate, np.where(self._place[1:] == 0, cull, fossilize))
        return np.concatenate([[0], of_seeds])

    @cached_property
    def kernel(self) -> Indices:
        """See the class."""
        found = np.full(len(self), -1, dtype=np.int64)
        for way, kernels in enumerate(self.fitting):
            seeds = np.flatnonzero(self.fit == way)
            found[self.first[seeds, None] + np.arange(len(kernels))] = kernels
        return found


class OneChoice:
    """One of the legal choices, by itself, with the same columns: to learn from what was chosen."""

    def __init__(self, choices: LegalChoices, index: int) -> None:
        seed, kernel = choices.seed[index : index + 1], choices.kernel[index : index + 1]
        self.action, self.seed = choices.action[index : index + 1], seed
        self.fit: Indices = np.full(len(choices.fit), -1, dtype=np.int64)
        self.first: Indices = np.zeros(len(choices.fit), dtype=np.int64)
        self.fitting: tuple[Indices, ...] = ()
        if self.action[0] == ACTIONS.index(Action.GERMINATE):
            self.fit[seed] = 0
            self.fitting = (kernel,)

    def __len__(self) -> int:
        return 1


def codes_of(names: Sequence[Any], codes: Mapping[Any, int]) -> Indices:
    """(N,): the number of each name. Views have thousands of them, so it takes them without a line of Python each.

    Raises:
        KeyError: one has no number.
    """
    return np.fromiter(map(codes.__getitem__, names), dtype=np.int64, count=len(names))


def legal_choices(view: GraphView) -> LegalChoices:
    """All legal choices of a view, always in one order."""
    return LegalChoices(view)
