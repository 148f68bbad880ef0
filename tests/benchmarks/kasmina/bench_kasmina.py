"""What seeds cost a model: dormant, disabled in PEFT, and awake; memory; and what wrap() takes.

Every figure is a ratio of interleaved rounds in one process, with the interval of the medians'
bootstrap: the machine's noise is in both sides of it.
"""

import argparse
import copy
import gc
import hashlib
import random
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torchvision
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import esper
from esper.kasmina.kernels import LoadedKernel, build_kernel, load_kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel
from esper.schemas.assets import BlueprintSpec

TARGETS = (nn.Linear, nn.Conv2d)
BILLION = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """One model, its input, and how many steps a round takes."""

    name: str
    make: Callable[[], nn.Module]
    x: Tensor
    steps: int


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 4)


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


CASES = (
    Case("Linear(128, 64), batch 32", lambda: nn.Sequential(nn.Linear(128, 64)), torch.randn(32, 128), 200),
    Case("Linear(2048, 2048), batch 32", lambda: nn.Sequential(nn.Linear(2048, 2048)), torch.randn(32, 2048), 8),
    Case("Conv2d(64, 64, 3), 16x16", lambda: nn.Sequential(nn.Conv2d(64, 64, 3)), torch.randn(8, 64, 16, 16), 10),
    Case("MLP 128-64-64-10, batch 32", lambda: mlp(128, 64, 64, 10), torch.randn(32, 128), 100),
    Case("transformer, 4 x 128", encoder, torch.randn(4, 32, 128), 3),
    Case("resnet18, 2 x 32x32", resnet18, torch.randn(2, 3, 32, 32), 1),
)


def in_peft(model: nn.Module) -> nn.Module:
    """The model with a LoRA adapter of rank 4 on every target layer, disabled."""
    names = [n for n, m in model.named_modules() if type(m) in TARGETS]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    adapted.disable_adapter_layers()
    for p in adapted.parameters():
        p.requires_grad_(True)
    return adapted


def round_s(model: nn.Module, case: Case) -> float:
    began = time.perf_counter()
    for _n in range(case.steps):
        model(case.x).sum().backward()
    return time.perf_counter() - began


def compared(models: Mapping[str, nn.Module], case: Case, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, in an order that changes from round to round."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        round_s(model, case)  # warm
    for _round in range(num_rounds):
        for name in order.sample(list(models), len(models)):
            times[name].append(round_s(models[name], case))
    return times


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median, and the 95 % interval of its bootstrap."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _n in range(1000))
    return statistics.median(ratios), medians[25], medians[975]


def report(times: Mapping[str, list[float]], case: Case) -> None:
    for name, taken in times.items():
        ratios = [t / p for t, p in zip(taken, times["plain"], strict=True)]
        median, low, high = interval(ratios)
        each = 1e6 * statistics.median(taken) / case.steps
        print(f"  {name:<28}{each:>11.1f} us{median:>9.3f}   {low:.3f}..{high:.3f}", flush=True)


def kernel_for(handle: KasminaLayer, module: str, **parameters: float) -> LoadedKernel:
    spec = BlueprintSpec(module=module, parameters=parameters, targets=(handle.kind,))
    data = build_kernel("bench", spec, handle.kind, handle.num_features)
    return load_kernel(data, hashlib.sha256(data).hexdigest())


def with_one_seed(model: MorphableModel, stage_boundaries: int) -> MorphableModel:
    """A model with one low-rank seed in its first layer, so many boundaries after it germinated."""
    handle = next(iter(model.layers.values()))
    kernel = kernel_for(handle, "low_rank", rank=4)
    plan = model.plan_germinate(handle.layer_id, 0, kernel)
    model.apply_transition(plan, step=0, boundary=0, kernel=kernel)
    for boundary in range(1, stage_boundaries):
        for plan in model.plan_advance(boundary):
            handle.awake[0].has_run = True
            model.apply_transition(plan, step=boundary, boundary=boundary)
    return model


def steps(num_rounds: int) -> None:
    print(
        f"forward and backward, {num_rounds} interleaved rounds; ratio to the plain model, 95 % interval of its median"
    )
    for case in CASES:
        torch.manual_seed(0)
        plain = case.make()
        models = {
            "plain": plain,
            "plain again": copy.deepcopy(plain),
            "dormant": esper.wrap(copy.deepcopy(plain), TARGETS),
            "PEFT, adapter disabled": in_peft(copy.deepcopy(plain)),
            "one seed in TRAINING": with_one_seed(esper.wrap(copy.deepcopy(plain), TARGETS), 2),
            "one seed blended in": with_one_seed(esper.wrap(copy.deepcopy(plain), TARGETS), 16),
        }
        print(f"{case.name} ({sum(p.numel() for p in plain.parameters()):,} parameters)")
        report(compared(models, case, num_rounds), case)


def compiled(num_rounds: int) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        print("compiled: left out, since inductor finds no C++ compiler here")
        return
    print(f"the same, compiled by inductor, {num_rounds} rounds")
    for case in (CASES[0], CASES[3], CASES[4]):
        torch.compiler.reset()
        torch.manual_seed(0)
        plain = case.make()
        seeded = esper.wrap(copy.deepcopy(plain), TARGETS)
        models = {
            "plain": torch.compile(plain, fullgraph=True),
            "dormant": torch.compile(esper.wrap(copy.deepcopy(plain), TARGETS), fullgraph=True),
            "one seed in TRAINING": torch.compile(seeded, fullgraph=True),
        }
        print(case.name)
        round_s(models["one seed in TRAINING"], case)
        with_one_seed(seeded, 2)
        began = time.perf_counter()
        models["one seed in TRAINING"](case.x).sum().backward()
        print(f"  the transition into TRAINING compiles again: {time.perf_counter() - began:.1f} s, once")
        report(compared(models, case, num_rounds), case)


def dense(num_parameters: int, width: int = 4096) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _n in range(num_parameters // width**2)))


def wrap_times() -> None:
    print("wrap(), seconds, and what it adds")
    gib = 2**30
    for where, num_parameters in (("meta", BILLION), ("cpu", BILLION), ("cpu", 100_000_000)):
        with torch.device(where):
            model = dense(num_parameters)
        count = sum(p.numel() for p in model.parameters())
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        began = time.perf_counter()
        wrapped = esper.wrap(model)
        took = time.perf_counter() - began
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak
        print(
            f"  {count / 1e9:.2f}B parameters on {where}: {1e3 * took:.1f} ms, {len(wrapped.layers)} layers, "
            f"{sum(h.num_seeds for h in wrapped.layers.values())} seeds; peak memory +{100 * more / (4 * count):.3f} % "
            f"of {4 * count / gib:.1f} GiB",
            flush=True,
        )
        del model, wrapped
    with torch.device("meta"):
        many = nn.Sequential(*(nn.Linear(64, 64) for _n in range(10_000)))
    began = time.perf_counter()
    esper.wrap(many)
    print(f"  10,000 layers: {1e3 * (time.perf_counter() - began):.0f} ms")


def moves() -> None:
    model = esper.wrap(mlp(128, 64, 64, 10), TARGETS)
    handle = model.layers["0"]
    kernel = kernel_for(handle, "low_rank", rank=4)
    optimizer = torch.optim.AdamW(model.parameters())
    into, out, idle = [], [], []
    for n in range(1, 301):
        boundary = 10 * n
        began = time.perf_counter()
        model.plan_advance(boundary)
        idle.append(time.perf_counter() - began)
        began = time.perf_counter()
        plan = model.plan_germinate("0", 0, kernel)
        model.apply_transition(plan, step=boundary, boundary=boundary, kernel=kernel, optimizer=optimizer)
        into.append(time.perf_counter() - began)
        began = time.perf_counter()
        plan = model.plan_cull("0", 0)
        model.apply_transition(plan, step=boundary, boundary=boundary, optimizer=optimizer)
        out.append(time.perf_counter() - began)
        (plan,) = model.plan_advance(boundary + 9)
        model.apply_transition(plan, step=boundary + 9, boundary=boundary + 9, optimizer=optimizer)
    for name, taken in (("germinate", into), ("cull", out), ("a boundary with nothing due", idle)):
        print(f"  {name:<28}{1e6 * statistics.median(taken):>11.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    num_rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    steps(num_rounds)
    compiled(max(4, num_rounds // 2))
    print("moves")
    moves()
    wrap_times()


if __name__ == "__main__":
    main()
