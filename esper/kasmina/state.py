"""The state of all seeds of a model: one numpy array a field, layers by seeds.

The arrays are authoritative; modules and devices follow them. ``STAGE_CODES`` of
esper.schemas.lifecycle are the numbers in ``stage``.

L: layers, S: seeds per layer (the widest; a layer may have fewer).
"""

import numpy as np
import numpy.typing as npt

from esper.errors import ContractError
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import STAGE_CODES, STAGES, is_allowed

NO_KERNEL = -1

FIELDS: dict[str, type[np.generic]] = {
    "stage": np.uint8,
    "kernel_id": np.int64,
    "alpha": np.float16,
    "health": np.float32,
    "since_step": np.int64,
    "since_boundary": np.int64,
    "germinated_at_step": np.int64,
}


class SeedArrays:
    """Structure of arrays, each of shape (L, S). Refuses moves that the table does not have."""

    def __init__(self, num_layers: int, num_seeds: int) -> None:
        shape = (num_layers, num_seeds)
        self.stage: npt.NDArray[np.uint8] = np.zeros(shape, np.uint8)
        self.kernel_id: npt.NDArray[np.int64] = np.full(shape, NO_KERNEL, np.int64)
        self.alpha: npt.NDArray[np.float16] = np.zeros(shape, np.float16)
        self.health: npt.NDArray[np.float32] = np.ones(shape, np.float32)
        self.since_step: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
        self.since_boundary: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
        self.germinated_at_step: npt.NDArray[np.int64] = np.zeros(shape, np.int64)

    def stage_of(self, layer: int, seed: int) -> SeedStage:
        """The stage of one seed."""
        return STAGES[int(self.stage[layer, seed])]

    def move(self, layer: int, seed: int, to: SeedStage, *, step: int, boundary: int) -> None:
        """Move one seed.

        Raises:
            ContractError: the transition table does not have the move; nothing changed.
        """
        current = self.stage_of(layer, seed)
        if not is_allowed(current, to):
            raise ContractError(f"a {current} seed cannot become {to}")
        self.stage[layer, seed] = STAGE_CODES[to]
        self.since_step[layer, seed] = step
        self.since_boundary[layer, seed] = boundary
        if to is SeedStage.GERMINATED:
            self.germinated_at_step[layer, seed] = step

    def set_alpha(self, layer: int, seed: int, alpha: float) -> None:
        """Record how much of a seed is blended in, 0 to 1."""
        self.alpha[layer, seed] = alpha

    def delay(self, layer: int, seed: int, *, boundaries: int) -> None:
        """Let a seed's stage begin one step later, and so many boundaries: its time stands still."""
        self.since_step[layer, seed] += 1
        self.since_boundary[layer, seed] += boundaries

    def not_dormant(self) -> list[tuple[int, int]]:
        """Layer and seed of all seeds that are not dormant, in that order."""
        return [(int(layer), int(seed)) for layer, seed in zip(*np.nonzero(self.stage), strict=True)]

    def to_lists(self) -> dict[str, list[list[float]]]:
        """All fields as plain lists, for a checkpoint."""
        return {name: getattr(self, name).tolist() for name in FIELDS}

    def load_lists(self, lists: dict[str, list[list[float]]]) -> None:
        """The inverse of ``to_lists``.

        Raises:
            ContractError: the lists are of another model.
        """
        for name, kind in FIELDS.items():
            loaded = np.asarray(lists[name], dtype=kind)
            if loaded.shape != self.stage.shape:
                raise ContractError(f"seed state of shape {loaded.shape} for a model of {self.stage.shape}")
            setattr(self, name, loaded)
