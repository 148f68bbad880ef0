"""DeviceMarks: what calls left on the device for the host to read, fetched without waiting for it.

On the CPU reading is free of waits. On an accelerator the marks of all seeds travel in one copy
that is read at a later step, when it has arrived.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.seeds import AwakeSeed, Mark


class DeviceMarks:
    """Reads and clears the marks of awake seeds, one copy at a time."""

    def __init__(self) -> None:
        self._under_way: dict[torch.device, tuple[list[int], Tensor, torch.cuda.Event]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_under_way": {}}  # a copy of a model hears of its own calls only

    def read(self, seeds: Iterable[AwakeSeed]) -> dict[int, Mark]:
        """What has arrived, by ``id`` of the seed; nothing of a device whose copy is under way."""
        by_device: dict[torch.device, list[AwakeSeed]] = {}
        for seed in seeds:
            by_device.setdefault(seed.marks.device, []).append(seed)
        found: dict[int, Mark] = {}
        for device, listed in by_device.items():
            if device.type == "cuda":
                found |= self._arrived(device, listed)
            else:
                found |= {id(seed): mark for seed in listed if (mark := _taken(seed)).has_run}
        return found

    def _arrived(self, device: torch.device, listed: list[AwakeSeed]) -> dict[int, Mark]:
        arrived: dict[int, Mark] = {}
        if device in self._under_way:
            ids, copied, done = self._under_way[device]
            if not done.query():  # type: ignore[no-untyped-call]  # torch's events have no types
                return {}
            arrived = {i: Mark(*values) for i, values in zip(ids, copied.tolist(), strict=True)}
        stacked = torch.stack([seed.marks for seed in listed])
        copied = torch.empty(stacked.shape, dtype=torch.bool, pin_memory=True)
        copied.copy_(stacked, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        for seed in listed:
            seed.marks.zero_()
        self._under_way[device] = [id(seed) for seed in listed], copied, done
        return arrived


def _taken(seed: AwakeSeed) -> Mark:
    mark = Mark(*seed.marks.tolist())
    if mark.has_run:
        seed.marks.zero_()
    return mark
