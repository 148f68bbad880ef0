"""Views side by side as one graph of several parts: what the network takes in one pass.

Runs are offered the same kernels as a rule. So kernels that are alike are one row, and all dormant
seeds that are offered the same ones are scored by one product of two matrices.

B: views, L: layers, S: seeds, K: different kernels that are offered, E: edges, C: choices, each of all views together.
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
"""The number of every blueprint that a network was not trained on."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Seeds (N,) that are each offered the same kernels (M,): N x M choices."""

    seeds: Tensor
    kernels: Tensor


@dataclass(frozen=True, slots=True)
class GraphBatch:
    """Tensors of B views. Indices are of the whole batch.

    Attributes:
        run (B, F_run), layers (L, F_layer), seeds (S, F_seed), kernels (K, F_kernel): float32.
        blueprint (K,): number of the kernel's blueprint.
        edges (2, E): from row to row of ``layers``.
        seed_layer (S,): the layer of each seed; layer_graph (L,): the view of each layer.
        first (B,): where each view's choices begin; there is its WAIT.
        offers, germinate: all germinations, and where each is, offer by offer and row by row.
        cull, fossilize (2, N): seed, and where the choice is.
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
    first: Tensor
    offers: tuple[Offer, ...]
    germinate: Tensor
    cull: Tensor
    fossilize: Tensor
    num_choices: tuple[int, ...]

    @classmethod
    def of(cls, views: Sequence[ViewArrays], blueprints: Mapping[str, int]) -> Self:
        """Lay views side by side; ``blueprints`` numbers those that are known, from 1."""
        at_layer = _offsets([len(v.layers) for v in views])
        at_seed = _offsets([len(v.seeds) for v in views])
        num_choices = [len(v.choices) for v in views]
        at_choice = _offsets(num_choices)
        shop = _KernelDeduplicator(blueprints)
        for view, seed, choice in zip(views, at_seed, at_choice, strict=True):
            shop.take_in(view, seed, choice)
        offers, germinate = shop.offers()
        return cls(
            run=torch.from_numpy(np.concatenate([v.run for v in views])),
            layers=torch.from_numpy(np.concatenate([v.layers for v in views])),
            seeds=torch.from_numpy(np.concatenate([v.seeds for v in views])),
            kernels=torch.from_numpy(shop.rows(views[0].kernels.shape[1])),
            blueprint=torch.tensor(shop.blueprints, dtype=torch.int64),
            edges=_moved([v.edges for v in views], at_layer, axis=1),
            seed_layer=_moved([v.choices.seed_layer for v in views], at_layer),
            layer_graph=torch.from_numpy(np.repeat(np.arange(len(views)), [len(v.layers) for v in views])),
            first=torch.tensor(at_choice),
            offers=offers,
            germinate=germinate,
            cull=_ends(Action.CULL, views, at_seed, at_choice),
            fossilize=_ends(Action.FOSSILIZE, views, at_seed, at_choice),
            num_choices=tuple(num_choices),
        )

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        if self.run.device == torch.device(device):
            return self
        return self.each(lambda tensor: tensor.to(device))

    def each(self, moved: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor as ``moved`` makes it."""
        tensors: dict[str, Any] = {name: moved(getattr(self, name)) for name in _TENSORS}
        return replace(self, offers=tuple(Offer(moved(o.seeds), moved(o.kernels)) for o in self.offers), **tensors)


_TENSORS = tuple(f.name for f in fields(GraphBatch) if f.name not in ("offers", "num_choices"))


class _KernelDeduplicator:
    """The kernels that are offered, each once, and to which seeds."""

    def __init__(self, blueprints: Mapping[str, int]) -> None:
        self.blueprints: list[int] = []
        self._known = blueprints
        self._rows: list[np.ndarray] = []
        self._numbers: dict[tuple[str, bytes], int] = {}
        self._seeds: dict[tuple[int, ...], list[Indices]] = {}
        self._places: dict[tuple[int, ...], list[Indices]] = {}

    def take_in(self, view: ViewArrays, at_seed: int, at_choice: int) -> None:
        """One view, whose seeds and choices begin there."""
        choices = view.choices
        kernels = list(zip(view.blueprints, _as_bytes(view.kernels), strict=True))
        for way, fitting in enumerate(choices.fitting):
            seeds = np.flatnonzero(choices.fit == way)
            if len(seeds) and len(fitting):
                offered = tuple([self._number(kernels[n], view, n) for n in fitting.tolist()])
                self._seeds.setdefault(offered, []).append(seeds + at_seed)
                self._places.setdefault(offered, []).append(choices.first[seeds] + at_choice)

    def offers(self) -> tuple[tuple[Offer, ...], Tensor]:
        """All offers, and the places of their choices."""
        made, places = [], [np.zeros(0, dtype=np.int64)]
        for offered, seeds in self._seeds.items():
            made.append(
                Offer(torch.from_numpy(np.concatenate(seeds)), torch.from_numpy(np.array(offered, dtype=np.int64)))
            )
            first = np.concatenate(self._places[offered])
            places.append((first[:, None] + np.arange(len(offered))).reshape(-1))
        return tuple(made), torch.from_numpy(np.concatenate(places))

    def rows(self, num_features: int) -> np.ndarray:
        """(K, F_kernel)."""
        return np.stack(self._rows) if self._rows else np.zeros((0, num_features), dtype=np.float32)

    def _number(self, kernel: tuple[str, bytes], view: ViewArrays, row: int) -> int:
        number = self._numbers.get(kernel)
        if number is None:
            number = self._numbers[kernel] = len(self._rows)
            self._rows.append(view.kernels[row])
            self.blueprints.append(self._known.get(kernel[0], UNKNOWN_BLUEPRINT))
        return number


def _as_bytes(rows: np.ndarray) -> list[bytes]:
    """The bytes of each row, (N, F)."""
    data, size = rows.tobytes(), rows.shape[1] * rows.itemsize
    return [data[n : n + size] for n in range(0, len(data), size)]


def _ends(action: Action, views: Sequence[ViewArrays], at_seed: Sequence[int], at_choice: Sequence[int]) -> Tensor:
    """(2, N): the seeds that one action is open to, and where that choice is."""
    found = []
    for view, seed, choice in zip(views, at_seed, at_choice, strict=True):
        seeds, places = view.choices.ends(action)
        found.append(np.stack([seeds + seed, places + choice]))
    return torch.from_numpy(np.concatenate(found, axis=1))


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()][:-1]


def _moved(arrays: Sequence[Indices], by: Sequence[int], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate([a + n for a, n in zip(arrays, by, strict=True)], axis=axis))
