"""What a wrapped model costs while all its seeds are dormant: ratio of interleaved runs, and of one awake seed."""

import hashlib
import statistics
import time

import torch
from torch import nn

import esper
from esper.kasmina.kernels import build_kernel, load_kernel
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind

ROUNDS, STEPS = 40, 60


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    began = time.perf_counter()
    for _n in range(STEPS):
        model(x).sum().backward()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(32, 128)
    plain, dormant, awake = make(), esper.wrap(make()), esper.wrap(make())
    spec = BlueprintSpec(module="low_rank", parameters={"rank": 4}, targets=(LayerKind.LINEAR,))
    data = build_kernel("low-rank-4", spec, LayerKind.LINEAR, 64)
    kernel = load_kernel(data, hashlib.sha256(data).hexdigest())
    awake.apply_transition(awake.plan_germinate("0", 0, kernel), step=0, boundary=0, kernel=kernel)
    awake.apply_transition(awake.plan_advance(1)[0], step=1, boundary=1)
    models = {"plain": plain, "dormant, host called": dormant.host, "dormant": dormant, "one seed in training": awake}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _round in range(ROUNDS):
        for name, model in models.items():
            times[name].append(seconds(model, x))
    base = statistics.median(times["plain"])
    for name, taken in times.items():
        ratios = [t / p for t, p in zip(taken, times["plain"], strict=True)]
        low, high = statistics.quantiles(ratios, n=10)[0], statistics.quantiles(ratios, n=10)[-1]
        median = statistics.median(taken)
        print(
            f"{name:22} {1e6 * median / STEPS:8.1f} us/step  {median / base:6.3f} of plain (80 % in {low:.3f}..{high:.3f})"
        )


if __name__ == "__main__":
    main()
