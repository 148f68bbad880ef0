"""Several views as one disconnected graph: the input of one forward pass.

Runs usually have the same kernels. So equal kernels are one row, and all dormant seeds with the same candidate kernels
are scored by one matrix product.

B: views, L: layers, S: seeds, K: distinct kernels, E: edges, C: choices, each of all views together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from esper.schemas.enums import Action
from esper.services.tamiyo.control.legal_choices import Indices
from esper.services.tamiyo.gnn.view_arrays import ViewArrays

UNKNOWN_BLUEPRINT = 0
"""The code of every blueprint that a network was not trained on."""


@dataclass(frozen=True, slots=True)
class GerminationGroup:
    """Seeds (N,) with the same candidate kernels (M,): N x M choices."""

    seeds: Tensor
    kernels: Tensor


@dataclass(frozen=True, slots=True)
class GraphBatch:
    """Tensors of B views. Indices are those of the whole batch.

    Attributes:
        run (B, F_run), layers (L, F_layer), seeds (S, F_seed), kernels (K, F_kernel): float32.
        blueprint (K,): code of the kernel's blueprint.
        edges (2, E): from row to row of ``layers``.
        seed_layer (S,): the layer of each seed; layer_graph (L,): the view of each layer.
        germinations, germination_choice: all germinations, and the index of each choice, group by group and row by row.
        cull, fossilize (2, N): seed, and the index of the choice.
        num_choices: of each view, in order.
    """

    run: Tensor
    layers: Tensor
    seeds: Tensor
    kernels: Tensor
    blueprint: Tensor
    edges: Tensor
    seed_layer: Tensor
    layer_graph: Tensor
    germinations: tuple[GerminationGroup, ...]
    germination_choice: Tensor
    cull: Tensor
    fossilize: Tensor
    num_choices: tuple[int, ...]

    @classmethod
    def of(cls, views: Sequence[ViewArrays], blueprint_codes: Mapping[str, int]) -> Self:
        """Combine views; ``blueprint_codes`` has the known blueprints, with codes from 1."""
        layer_offsets = _offsets([len(v.layers) for v in views])
        seed_offsets = _offsets([len(v.seeds) for v in views])
        num_choices = [len(v.choices) for v in views]
        choice_offsets = _offsets(num_choices)
        kernels = _KernelDeduplicator(blueprint_codes)
        for offsets in zip(views, seed_offsets, choice_offsets, strict=True):
            kernels.add(*offsets)
        germinations, germination_choice = kernels.germinations()
        return cls(
            run=torch.from_numpy(np.concatenate([v.run for v in views])),
            layers=torch.from_numpy(np.concatenate([v.layers for v in views])),
            seeds=torch.from_numpy(np.concatenate([v.seeds for v in views])),
            kernels=torch.from_numpy(kernels.rows(views[0].kernels.shape[1])),
            blueprint=torch.tensor(kernels.blueprints, dtype=torch.int64),
            edges=_shifted([v.edges for v in views], layer_offsets, axis=1),
            seed_layer=_shifted([v.choices.seed_layer for v in views], layer_offsets),
            layer_graph=torch.from_numpy(np.repeat(np.arange(len(views)), [len(v.layers) for v in views])),
            germinations=germinations,
            germination_choice=germination_choice,
            cull=_ending(Action.CULL, views, seed_offsets, choice_offsets),
            fossilize=_ending(Action.FOSSILIZE, views, seed_offsets, choice_offsets),
            num_choices=tuple(num_choices),
        )

    def to(self, device: torch.device | str) -> Self:
        """Move the batch to a device."""
        if self.run.device == torch.device(device):
            return self
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        groups = tuple(GerminationGroup(function(g.seeds), function(g.kernels)) for g in self.germinations)
        return replace(self, germinations=groups, **tensors)


_TENSORS = tuple(f.name for f in fields(GraphBatch) if f.name not in ("germinations", "num_choices"))


class _KernelDeduplicator:
    """Collects distinct kernels, and the seeds for which each set of kernels is legal."""

    def __init__(self, blueprint_codes: Mapping[str, int]) -> None:
        self.blueprints: list[int] = []
        self._blueprint_codes = blueprint_codes
        self._rows: list[np.ndarray] = []
        self._row_of: dict[tuple[str, bytes], int] = {}
        self._seeds: dict[tuple[int, ...], list[Indices]] = {}
        self._first_choices: dict[tuple[int, ...], list[Indices]] = {}

    def add(self, view: ViewArrays, seed_offset: int, choice_offset: int) -> None:
        """Add a view, whose first seed and choice have these indices."""
        choices = view.choices
        kernels = list(zip(view.blueprints, _row_bytes(view.kernels), strict=True))
        for shape, fitting in enumerate(choices.kernels_by_shape):
            seeds = np.flatnonzero(choices.seed_shape == shape)
            if len(seeds) and len(fitting):
                rows = tuple([self._row(kernels[n], view, n) for n in fitting.tolist()])
                self._seeds.setdefault(rows, []).append(seeds + seed_offset)
                self._first_choices.setdefault(rows, []).append(choices.first_choice[seeds] + choice_offset)

    def germinations(self) -> tuple[tuple[GerminationGroup, ...], Tensor]:
        """Return all groups, and the indices of their choices."""
        groups, indices = [], [np.zeros(0, dtype=np.int64)]
        for rows, seeds in self._seeds.items():
            kernels = torch.from_numpy(np.array(rows, dtype=np.int64))
            groups.append(GerminationGroup(torch.from_numpy(np.concatenate(seeds)), kernels))
            first = np.concatenate(self._first_choices[rows])
            indices.append((first[:, None] + np.arange(len(rows))).reshape(-1))
        return tuple(groups), torch.from_numpy(np.concatenate(indices))

    def rows(self, num_features: int) -> np.ndarray:
        """Return the features of the distinct kernels, (K, F_kernel)."""
        return np.stack(self._rows) if self._rows else np.zeros((0, num_features), dtype=np.float32)

    def _row(self, kernel: tuple[str, bytes], view: ViewArrays, index: int) -> int:
        row = self._row_of.get(kernel)
        if row is None:
            row = self._row_of[kernel] = len(self._rows)
            self._rows.append(view.kernels[index])
            self.blueprints.append(self._blueprint_codes.get(kernel[0], UNKNOWN_BLUEPRINT))
        return row


def _row_bytes(rows: np.ndarray) -> list[bytes]:
    """Return the bytes of each row of (N, F)."""
    data, size = rows.tobytes(), rows.shape[1] * rows.itemsize
    return [data[n : n + size] for n in range(0, len(data), size)]


def _ending(
    action: Action, views: Sequence[ViewArrays], seed_offsets: Sequence[int], choice_offsets: Sequence[int]
) -> Tensor:
    """Return the seeds for which an ending action is legal, and the indices of these choices, (2, N)."""
    found = []
    for view, seed_offset, choice_offset in zip(views, seed_offsets, choice_offsets, strict=True):
        seeds, indices = view.choices.ending(action)
        found.append(np.stack([seeds + seed_offset, indices + choice_offset]))
    return torch.from_numpy(np.concatenate(found, axis=1))


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()][:-1]


def _shifted(arrays: Sequence[Indices], offsets: Sequence[int], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate([a + n for a, n in zip(arrays, offsets, strict=True)], axis=axis))
