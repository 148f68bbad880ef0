"""DeviceMarks: what calls left on the device for the host to read, fetched without waiting for it.

On the CPU reading is free of waits. On an accelerator the marks of all seeds travel in one copy
that is read at a later step, when it has arrived.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from esper.kasmina.seeds import AwakeSeed, Mark


class DeviceMarks:
    """Reads and clears the marks of awake seeds, one copy at a time."""

    def __init__(self) -> None:
        self._under_way: tuple[list[int], Tensor, torch.cuda.Event] | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_under_way": None}  # a copy of a model hears of its own calls only

    def read(self, seeds: Iterable[AwakeSeed]) -> dict[int, Mark]:
        """What has arrived, by ``id`` of the seed; empty while a copy is under way."""
        listed = list(seeds)
        if listed[0].marks.device.type != "cuda":
            return {id(seed): mark for seed in listed if (mark := _taken(seed)).has_run}
        arrived: dict[int, Mark] = {}
        if self._under_way is not None:
            ids, copied, done = self._under_way
            if not done.query():  # type: ignore[no-untyped-call]
                return {}
            arrived = {i: Mark(*values) for i, values in zip(ids, copied.tolist(), strict=True)}
        stacked = torch.stack([seed.marks for seed in listed])
        copied = torch.empty(stacked.shape, dtype=torch.bool, pin_memory=True)
        copied.copy_(stacked, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        for seed in listed:
            seed.marks.zero_()
        self._under_way = [id(seed) for seed in listed], copied, done
        return arrived


def _taken(seed: AwakeSeed) -> Mark:
    mark = Mark(*seed.marks.tolist())
    if mark.has_run:
        seed.marks.zero_()
    return mark
