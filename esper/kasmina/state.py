"""The state of all seeds of a model: one numpy array a field, layers by seeds.

Owns the arrays, the check of every move against the table of esper.schemas.lifecycle, and the
version that counts changes. It holds no module and no tensor: modules and devices follow it.
Invariant: the arrays change only through the methods here, each of which is one step to every
other thread and makes one new version; what is refused changes nothing.

L: layers, S: seeds per layer (the widest; a layer may have fewer, and the rest stay dormant).
"""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.errors import ConflictError, ContractError
from esper.kasmina.fields import ALLOWED, FIELDS, SeedRows, read_only, stage_lengths
from esper.kasmina.kernel_ids import NO_KERNEL, KernelTable
from esper.kasmina.lifecycle import StageSchedule
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import STAGE_CODES, STAGES

SeedIndices = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
"""Layers and seeds, (n,) each, by layer and seed: what ``np.nonzero`` gives, and what indexes the arrays."""

_CODES = dict(STAGE_CODES)
_DORMANT, _GERMINATED = _CODES[SeedStage.DORMANT], _CODES[SeedStage.GERMINATED]
_ALLOWED: list[list[bool]] = ALLOWED.tolist()  # one cell of a list costs a third of one of an array


class SeedArrays:
    """Structure of arrays, each of shape (L, S) and read-only. Refuses moves that the table does not have.

    Any number of threads may share it. It can be copied and pickled at any time.

    Attributes:
        kernels: digest of each ``kernel_id``.
    """

    stage: npt.NDArray[np.uint8]
    kernel_id: npt.NDArray[np.int64]
    alpha: npt.NDArray[np.float16]
    health: npt.NDArray[np.float32]
    since_step: npt.NDArray[np.int64]
    since_boundary: npt.NDArray[np.int64]
    germinated_at_step: npt.NDArray[np.int64]

    def __init__(self, num_layers: int, num_seeds: int) -> None:
        fields = {name: np.zeros((num_layers, num_seeds), kind) for name, kind in FIELDS.items()}
        fields["kernel_id"].fill(NO_KERNEL)
        fields["health"].fill(1)
        self.__setstate__(
            {"fields": fields, "layer_version": np.zeros(num_layers, np.int64), "version": 0, "kernels": KernelTable()}
        )

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {
                "fields": {name: array.copy() for name, array in self._fields.items()},
                "layer_version": self._layer_version.copy(),
                "version": self._version,
                "kernels": self.kernels,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._fields: dict[str, npt.NDArray[Any]] = state["fields"]
        self._layer_version: npt.NDArray[np.int64] = state["layer_version"]
        self._version: int = state["version"]
        self.kernels: KernelTable = state["kernels"]
        self._snapshot: SeedRows | None = None
        for name, array in self._fields.items():
            setattr(self, name, read_only(array.view()))
        # A memoryview reads and writes one cell in two thirds of the time that numpy takes.
        self._layer_version_cells = memoryview(self._layer_version)
        self._stage_cells = memoryview(self._fields["stage"])
        self._kernel_id_cells = memoryview(self._fields["kernel_id"])
        self._since_step_cells = memoryview(self._fields["since_step"])
        self._since_boundary_cells = memoryview(self._fields["since_boundary"])
        self._germinated_at_step_cells = memoryview(self._fields["germinated_at_step"])

    # -- one seed ---------------------------------------------------------------------------

    def stage_of(self, layer: int, seed: int) -> SeedStage:
        """The stage of one seed."""
        return STAGES[self._stage_cells[layer, seed]]

    def sha256_of(self, layer: int, seed: int) -> str | None:
        """The digest of the kernel that a seed holds; a dormant one holds none."""
        return self.kernels.sha256_of(self._kernel_id_cells[layer, seed])

    def move(
        self,
        layer: int,
        seed: int,
        to: SeedStage,
        *,
        step: int,
        boundary: int,
        expected: SeedStage | None = None,
        kernel_sha256: str | None = None,
    ) -> int:
        """Move one seed, if it is still ``expected``; give the version that this made.

        A seed that germinates holds ``kernel_sha256`` until it is dormant again. Of two threads
        that move one seed from one stage with ``expected``, exactly one does.

        Raises:
            ConflictError: the seed is not ``expected`` any more.
            ContractError: the transition table does not have the move.
            KernelError: another kernel has the id of this one.
        """
        code = _CODES[to]
        kernel_id = NO_KERNEL
        if code == _GERMINATED and kernel_sha256 is not None:
            kernel_id = self.kernels.add(kernel_sha256)
        with self._lock:
            current = self._stage_cells[layer, seed]
            if expected is not None and current != _CODES[expected]:
                raise ConflictError(f"seed {layer}:{seed} is {STAGES[current]}, not {expected} any more")
            if not _ALLOWED[current][code]:
                raise ContractError(f"a {STAGES[current]} seed cannot become {to}")
            self._since_step_cells[layer, seed] = step
            self._since_boundary_cells[layer, seed] = boundary
            if code == _GERMINATED:
                self._germinated_at_step_cells[layer, seed] = step
                self._kernel_id_cells[layer, seed] = kernel_id
            elif code == _DORMANT:
                self._kernel_id_cells[layer, seed] = NO_KERNEL
            self._stage_cells[layer, seed] = code
            self._version = version = self._version + 1
            self._layer_version_cells[layer] = version
            return version

    def set_alpha(self, layer: int, seed: int, alpha: float) -> None:
        """Record how much of a seed is blended in, 0 to 1.

        Raises:
            ContractError: it is not in 0..1.
        """
        if not 0.0 <= alpha <= 1.0:
            raise ContractError(f"alpha is in 0..1, not {alpha}")
        recorded = np.float16(alpha)
        cells = self._fields["alpha"]
        with self._lock:
            if cells[layer, seed] != recorded:
                cells[layer, seed] = recorded
                self._touch(layer)

    def set_health(self, layer: int, scores: npt.ArrayLike) -> None:
        """Record the health scores of a layer's first n seeds, (n,), each 0 to 1.

        Raises:
            ContractError: they are too many, or one is not in 0..1.
        """
        new = np.asarray(scores, np.float32)
        row = self._fields["health"][layer]
        if new.ndim != 1 or len(new) > len(row) or not ((new >= 0.0) & (new <= 1.0)).all():
            raise ContractError(f"health is up to {len(row)} scores in 0..1, not {new}")
        with self._lock:
            if not np.array_equal(row[: len(new)], new):
                row[: len(new)] = new
                self._touch(layer)

    # -- many seeds -------------------------------------------------------------------------

    def move_where(
        self,
        where: npt.NDArray[np.bool_] | SeedIndices,
        to: SeedStage,
        *,
        step: int,
        boundary: int,
        expected: SeedStage | None = None,
    ) -> int:
        """Move the seeds of a mask (L, S), or of indices, all or none; give the version that this made.

        Like ``move``, in one step to other threads and one version. Seeds that germinate so hold no
        kernel. With no seeds nothing happens, and the version stays.

        The requirement of batched transitions; bench_kasmina_state.py measures it.

        Raises:
            ConflictError: a seed is not ``expected`` any more; the message names the first.
            ContractError: the transition table does not have a move, or there is no such seed.
        """
        code = _CODES[to]
        at = self._flat(where)
        flat = {name: array.reshape(-1) for name, array in self._fields.items()}
        with self._lock:
            current = flat["stage"][at]
            if expected is not None and (lost := current != _CODES[expected]).any():
                raise ConflictError(f"{self._first(at, current, lost)}, not {expected} any more")
            if not (movable := np.take(ALLOWED[:, code], current)).all():
                raise ContractError(f"{self._first(at, current, ~movable)} and cannot become {to}")
            flat["stage"][at] = code
            flat["since_step"][at] = step
            flat["since_boundary"][at] = boundary
            if code == _GERMINATED:
                flat["germinated_at_step"][at] = step
            if code in (_GERMINATED, _DORMANT):
                flat["kernel_id"][at] = NO_KERNEL
            return self._touch(at // self.stage.shape[1]) if len(at) else self._version

    def not_dormant(self) -> SeedIndices:
        """All seeds that are not dormant."""
        with self._lock:
            at = np.flatnonzero(self.stage != _DORMANT)
        return self._indices(at)

    def due(self, boundary: int, schedule: StageSchedule) -> SeedIndices:
        """The seeds that the schedule moves at this boundary."""
        lengths = stage_lengths(schedule)
        with self._lock:
            awake = np.flatnonzero(self.stage != _DORMANT)
            waited = boundary - self.since_boundary.reshape(-1)[awake]
            stages = self.stage.reshape(-1)[awake]
        return self._indices(awake[waited >= lengths[stages]])

    # -- readers that follow ----------------------------------------------------------------

    @property
    def version(self) -> int:
        """Counts the changes; the same number means the same state. Not part of a checkpoint."""
        return self._version

    @property
    def num_bytes(self) -> int:
        """What the arrays take."""
        return sum(array.nbytes for array in self._fields.values()) + self._layer_version.nbytes

    def snapshot(self) -> SeedRows:
        """All rows. The same object until something changes."""
        cached = self._snapshot
        if cached is None or cached.version != self._version:
            with self._lock:
                cached = self._snapshot = self._rows(slice(None))
        return cached

    def changes_since(self, version: int) -> SeedRows:
        """The rows that have changed since ``version``: writing them over rows of then gives those of now.

        The requirement of state sync in less than 1 ms; bench_kasmina_state.py measures it.
        """
        with self._lock:
            return self._rows(np.flatnonzero(self._layer_version > version))

    def delay(self, layer: int, seed: int, *, boundaries: int) -> None:
        """Let a seed's stage begin one step later, and so many boundaries: its time stands still."""
        with self._lock:
            self._since_step_cells[layer, seed] += 1
            self._since_boundary_cells[layer, seed] += boundaries
            self._touch(layer)

    def to_lists(self) -> dict[str, list[list[float]]]:
        """All fields as plain lists, for a checkpoint."""
        rows = self.snapshot()
        return {name: getattr(rows, name).tolist() for name in FIELDS}

    def load_lists(self, lists: dict[str, list[list[float]]]) -> None:
        """The inverse of ``to_lists``. Digests are not in it: ``kernels.add`` those of the checkpoint.

        Raises:
            ContractError: the lists are of another model, or not what ``to_lists`` gives; nothing changed.
        """
        try:
            loaded = {name: np.array(lists[name], dtype=kind) for name, kind in FIELDS.items()}
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ContractError(f"not a seed state: {error!r}") from error
        shapes = {array.shape for array in loaded.values()}
        if shapes != {self.stage.shape}:
            raise ContractError(f"seed state of shape {shapes} for a model of {self.stage.shape}")
        if loaded["stage"].max(initial=0) >= len(STAGES):
            raise ContractError(f"seed state has stage {loaded['stage'].max()}, which nobody knows")
        with self._lock:
            for name, array in loaded.items():
                np.copyto(self._fields[name], array)
            self._touch(slice(None))

    # -- inside -----------------------------------------------------------------------------

    def _touch(self, layers: int | slice | npt.NDArray[np.intp]) -> int:
        self._version += 1
        self._layer_version[layers] = self._version
        return self._version

    def _rows(self, layers: slice | npt.NDArray[np.intp]) -> SeedRows:
        fields = {name: read_only(array[layers].copy()) for name, array in self._fields.items()}
        return SeedRows(self._version, read_only(np.arange(len(self.stage))[layers]), **fields)

    def _flat(self, where: npt.NDArray[np.bool_] | SeedIndices) -> npt.NDArray[np.intp]:
        shape = self.stage.shape
        if isinstance(where, tuple):
            try:
                return np.ravel_multi_index(where, shape)
            except ValueError as error:
                raise ContractError(f"no such seeds in a model of {shape}: {error}") from error
        if where.dtype != np.bool_ or where.shape != shape:
            raise ContractError(f"a mask of {where.dtype} {where.shape} for a model of {shape}")
        return np.flatnonzero(where)

    def _indices(self, at: npt.NDArray[np.intp]) -> SeedIndices:
        layers, seeds = np.divmod(at, self.stage.shape[1])
        return layers, seeds

    def _first(self, at: npt.NDArray[np.intp], stages: npt.NDArray[np.uint8], bad: npt.NDArray[np.bool_]) -> str:
        n = int(bad.argmax())
        layer, seed = divmod(int(at[n]), self.stage.shape[1])
        return f"seed {layer}:{seed} is {STAGES[stages[n]]} ({bad.sum()} of {len(at)} seeds refused)"
