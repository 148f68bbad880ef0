"""The state of very many seeds as tensors of one device, moved there in one pass.

Owns a mirror for batches of millions; the arrays of SeedArrays stay the truth. Invariant: nothing
here waits for the device or reads a value back, so a batch is queued like any other kernel.

N: seeds, in the order of layer and seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from esper.kasmina.fields import SeedRows
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import STAGE_CODES, STAGES, TRANSITIONS

BYTES_PER_MOVE = 1 + (1 + 1) + (8 + 8) + (8 + 8) + 1
"""What one seed's move reads and writes: mask; stage; step; boundary; refusal. Measured against a plain copy."""

MAY_BECOME: Mapping[SeedStage, int] = MappingProxyType(
    {to: sum(1 << STAGE_CODES[at] for at in STAGES if to in TRANSITIONS[at]) for to in STAGES}
)
"""The transition table by columns: bit n says whether a seed at the stage of code n may become the key.

A gather from a table would have to be copied to each device, and reads memory where a shift does not.
"""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceSeeds:
    """The fields that a move changes, (N,) each, on one device.

    Attributes:
        stage: uint8, codes as in the arrays.
        since_step: int64.
        since_boundary: int64.
    """

    stage: Tensor
    since_step: Tensor
    since_boundary: Tensor

    @classmethod
    def of(cls, rows: SeedRows, device: torch.device | str) -> "DeviceSeeds":
        """A copy of the rows, (n, S), as (n * S,)."""
        fields = (rows.stage, rows.since_step, rows.since_boundary)
        return cls(*(torch.tensor(array.reshape(-1), device=device) for array in fields))


def move_on_device(seeds: DeviceSeeds, mask: Tensor, to: SeedStage, *, step: int, boundary: int) -> Tensor:
    """Move the seeds of a mask, bool (N,), in place; give those that were refused, bool (N,).

    Unlike ``SeedArrays.move_where`` it moves what the table allows and leaves the rest: to learn
    that one seed was refused before moving another would take a second pass over all of them.
    On CUDA one fused kernel does it, compiled at the first call.
    """
    # Numbers that change from call to call are tensors of the CPU: as Python numbers each would be compiled for.
    numbers = (torch.tensor(n) for n in (MAY_BECOME[to], STAGE_CODES[to], step, boundary))
    move = _compiled() if seeds.stage.device.type == "cuda" else move_fields
    return move(seeds.stage, seeds.since_step, seeds.since_boundary, mask, *numbers)


def move_fields(
    stage: Tensor,
    since_step: Tensor,
    since_boundary: Tensor,
    mask: Tensor,
    may_become: Tensor,
    code: Tensor,
    step: Tensor,
    boundary: Tensor,
) -> Tensor:
    """What ``move_on_device`` compiles: a bit of the table, and a select a field.

    Args:
        may_become: int64 (), of ``MAY_BECOME``.
        code: int64 (), of the stage to move to.
        step: int64 (), and ``boundary`` alike.

    The others are as in ``move_on_device``.
    """
    # A number takes the type of the tensor beside it, and uint8 would lose two of the ten bits.
    is_allowed = ((may_become >> stage.short()) & 1).bool()
    moved = mask & is_allowed
    stage.copy_(torch.where(moved, code.to(torch.uint8), stage))
    since_step.copy_(torch.where(moved, step, since_step))
    since_boundary.copy_(torch.where(moved, boundary, since_boundary))
    return mask & ~is_allowed


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(move_fields)
