"""The legal choices at a boundary: WAIT, or one action for one seed.

A wide model has tens of thousands of choices, so they are kept as columns. A choice becomes an object when it is
accessed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from esper.graph.graph_view import GraphView, KernelView, SeedView
from esper.graph.view_features import Level
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.schemas.events import DecisionMade
from esper.schemas.lifecycle import ACTIVE_STAGES
from esper.streams.read_models.pending_boundaries import UncommandedDecision

Indices = NDArray[np.int64]

ENDING_ACTIONS = (Action.CULL, Action.FOSSILIZE)
"""The actions for an active seed, in the order of its choices. The second one is legal in EVALUATING alone."""

_STAGES = {stage: n for n, stage in enumerate(SeedStage)}
_NUM_ENDING: Indices = np.array([(s in ACTIVE_STAGES) + (s is SeedStage.EVALUATING) for s in SeedStage], dtype=np.int64)
"""By stage, how many of ``ENDING_ACTIONS`` are legal."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An action and what it acts on. Only GERMINATE has a ``kernel``; all but WAIT have a ``seed``."""

    action: Action
    seed: SeedView | None = None
    kernel: KernelView | None = None


WAIT = Choice(Action.WAIT)


class LegalChoices(Sequence[Choice]):
    """All choices that the lifecycle and the available kernels allow; WAIT is the first.

    The choices of each seed follow, in the view's order: for a dormant seed the kernels that fit, in the view's order;
    for an active seed CULL, and in EVALUATING also FOSSILIZE.

    C: choices, S: seeds.

    Attributes:
        first_choice: (S,) int64, the index of each seed's first choice.
        kernels_by_shape: for each layer shape (kind and number of features) the indices of the kernels that fit.
        seed_shape: (S,) int64, the layer shape of each dormant seed; -1 for other seeds.
        seed_layer: (S,) int64, the layer of each seed.
    """

    def __init__(self, view: GraphView) -> None:
        self._view = view
        layers, seeds, kernels = (view.columns[level] for level in (Level.LAYER, Level.SEED, Level.KERNEL))
        shapes: dict[tuple[LayerKind, int], int] = {}
        layer_shapes = zip(layers["kind"], layers["num_features"], strict=True)
        layer_shape = np.array([shapes.setdefault(shape, len(shapes)) for shape in layer_shapes], dtype=np.int64)
        fitting: list[list[int]] = [[] for _shape in shapes]
        for n, target in enumerate(zip(kernels["target"], kernels["num_features"], strict=True)):
            if (shape := shapes.get(target)) is not None:
                fitting[shape].append(n)
        self.kernels_by_shape = tuple(np.array(indices, dtype=np.int64) for indices in fitting)
        stages = category_codes(seeds["stage"], _STAGES)
        is_dormant = stages == _STAGES[SeedStage.DORMANT]
        self.seed_layer = category_codes(seeds["layer_id"], view.layer_rows)
        shape_of_seed = layer_shape[self.seed_layer]
        num_fitting = np.array([len(indices) for indices in fitting], dtype=np.int64)
        self.seed_shape: Indices = np.where(is_dormant, shape_of_seed, -1)
        self._counts: Indices = np.where(
            is_dormant, num_fitting[shape_of_seed] if len(num_fitting) else 0, _NUM_ENDING[stages]
        )
        self.first_choice: Indices = 1 + np.cumsum(self._counts) - self._counts

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
        for seed, shape, count in zip(self._view.seeds, self.seed_shape.tolist(), self._counts.tolist(), strict=True):
            if shape < 0:
                yield from (Choice(action, seed) for action in ENDING_ACTIONS[:count])
            else:
                yield from (Choice(Action.GERMINATE, seed, kernels[n]) for n in self.kernels_by_shape[shape].tolist())

    def at(self, index: int) -> tuple[Action, int | None, int | None]:
        """Return a choice as its action, the index of its seed and the index of its kernel.

        Raises:
            IndexError: there are fewer choices.
        """
        index = range(len(self))[index]
        if index == 0:
            return Action.WAIT, None, None
        seed = int(self.first_choice.searchsorted(index, side="right")) - 1
        shape, offset = self.seed_shape[seed], index - int(self.first_choice[seed])
        if shape < 0:
            return ENDING_ACTIONS[offset], seed, None
        return Action.GERMINATE, seed, int(self.kernels_by_shape[shape][offset])

    def find(self, decision: DecisionMade | UncommandedDecision) -> int | None:
        """Return the index of the choice that a decision names; None if it is not legal.

        In the view that a decision was made on, its choice is always legal: nothing but the view decides that.
        """
        wanted = (decision.action, decision.layer_id, decision.seed_id, decision.blueprint_id)
        for n, choice in enumerate(self):
            seed, kernel = choice.seed, choice.kernel
            place = (seed.layer_id, seed.seed_id) if seed else (None, None)
            if (choice.action, *place, kernel.blueprint_id if kernel else None) == wanted:
                return n
        return None

    def ending(self, action: Action) -> tuple[Indices, Indices]:
        """Return the seeds for which an ending action is legal, and the indices of these choices, (N,) each."""
        offset = ENDING_ACTIONS.index(action)
        seeds = np.flatnonzero((self.seed_shape < 0) & (self._counts > offset))
        return seeds, self.first_choice[seeds] + offset


class SingleChoice:
    """One of the legal choices with the columns of ``LegalChoices``: training scores the chosen one alone."""

    def __init__(self, choices: LegalChoices, index: int) -> None:
        self._action, seed, kernel = choices.at(index)
        self._seeds: Indices = np.array([] if seed is None else [seed], dtype=np.int64)
        self.seed_layer = choices.seed_layer
        self.seed_shape: Indices = np.full(len(choices.seed_shape), -1, dtype=np.int64)
        self.first_choice: Indices = np.zeros(len(choices.seed_shape), dtype=np.int64)
        self.kernels_by_shape: tuple[Indices, ...] = ()
        if kernel is not None:
            self.seed_shape[seed] = 0
            self.kernels_by_shape = (np.array([kernel], dtype=np.int64),)

    def __len__(self) -> int:
        return 1

    def ending(self, action: Action) -> tuple[Indices, Indices]:
        """Return what ``LegalChoices.ending`` does."""
        seeds = self._seeds if action is self._action else self._seeds[:0]
        return seeds, np.zeros_like(seeds)


def category_codes(names: Sequence[Any], codes: Mapping[Any, int]) -> Indices:
    """Return the code of each name, (N,), without a Python loop: views have thousands of names.

    Raises:
        KeyError: a name has no code.
    """
    return np.fromiter(map(codes.__getitem__, names), dtype=np.int64, count=len(names))


def legal_choices(view: GraphView) -> LegalChoices:
    """Return all legal choices of a view, always in the same order."""
    return LegalChoices(view)
