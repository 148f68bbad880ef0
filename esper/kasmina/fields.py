"""What is known of a seed: the fields and their types, the moves as a table of codes, and frozen rows.

Owns no state. Rows of SeedArrays and tensors of a device both have these fields.

S: seeds per layer. A stage's code is that of ``STAGE_CODES`` in esper.schemas.lifecycle.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.kasmina.lifecycle import NEXT_BY_SCHEDULE, StageSchedule
from esper.schemas.lifecycle import STAGE_CODES, STAGES, TRANSITIONS

FIELDS: dict[str, type[np.generic]] = {
    "stage": np.uint8,
    "kernel_id": np.int64,
    "alpha": np.float16,
    "health": np.float32,
    "since_step": np.int64,
    "since_boundary": np.int64,
    "germinated_at_step": np.int64,
}
"""Field -> type: 39 bytes a seed.

``alpha`` is what a layer blends with, so that what is shown and resumed is what was used. A float16
in 0..1 is at most 2**-12 off, exact at both ends, and never falls while the schedule's alpha rises: it
tells every step of a linear graft of up to 2,048 apart; a longer one goes in stairs of at most 0.05 %.
"""

ALLOWED: npt.NDArray[np.bool_] = np.array([[to in TRANSITIONS[at] for to in STAGES] for at in STAGES])
"""(10, 10): whether a seed at the stage of the row's code may go to that of the column's."""
ALLOWED.flags.writeable = False

NEVER = np.iinfo(np.int64).max
"""Boundaries until the schedule moves a stage that it does not move."""


@dataclass(frozen=True, slots=True, eq=False)
class SeedRows:
    """Rows of the arrays as they stood together at one version. All arrays are copies that nobody can write.

    Attributes:
        version: of the state that the rows show.
        layers: (n,) the layers whose rows these are, ascending.

    The others are (n, S), as in SeedArrays.
    """

    version: int
    layers: npt.NDArray[np.intp]
    stage: npt.NDArray[np.uint8]
    kernel_id: npt.NDArray[np.int64]
    alpha: npt.NDArray[np.float16]
    health: npt.NDArray[np.float32]
    since_step: npt.NDArray[np.int64]
    since_boundary: npt.NDArray[np.int64]
    germinated_at_step: npt.NDArray[np.int64]


@lru_cache(maxsize=16)
def stage_lengths(schedule: StageSchedule) -> npt.NDArray[np.int64]:
    """(10,): boundaries that a seed stays, by the code of its stage."""
    lengths = np.full(len(STAGES), NEVER)
    for stage, (_to, field) in NEXT_BY_SCHEDULE.items():
        lengths[STAGE_CODES[stage]] = getattr(schedule, field)
    return read_only(lengths)


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same array, which refuses to be written from now on."""
    array.flags.writeable = False
    return array
