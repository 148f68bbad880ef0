"""What growth costs on two gloo ranks: a step of DDP on the plain model, on the dormant one, on a grown one.

Steps are interleaved, so that all of them meet the same noise; ratios are to the plain model's step beside them.
"""

import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.kasmina.distributed import Replicas
from esper.kasmina.kernels import build_kernel, load_kernel
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind, SeedStage

NUM_RANKS, NUM_ROUNDS, WARM_UP = 2, 60, 5
WIDTH, DEPTH, BATCH = 512, 8, 64
NAMES = ("plain", "dormant", "a seed in each layer", "the same, gradients averaged")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _n in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def grown(*, is_averaged: bool) -> nn.Module:
    """DDP with one blended seed in each layer; not averaged it would part the ranks, and shows what averaging adds."""
    model = esper.wrap(net())
    replica = DistributedDataParallel(model)
    spec = BlueprintSpec(module="low_rank", parameters={"rank": 4}, targets=(LayerKind.LINEAR,))
    data = build_kernel("low-rank-4", spec, LayerKind.LINEAR, WIDTH)
    kernel = load_kernel(data, hashlib.sha256(data).hexdigest())
    for layer_id in model.layers:
        model.apply_transition(model.plan_germinate(layer_id, 0, kernel), step=0, boundary=0, kernel=kernel)
    boundary = 0
    while any(seed.stage is not SeedStage.EVALUATING for seed in model.seeds_not_dormant()):
        boundary += 1
        for plan in model.plan_advance(boundary):
            model.apply_transition(plan, step=boundary, boundary=boundary)
        for layer in model.layers.values():
            layer.awake[0].has_run = True  # nothing is trained here: a seed that never ran would be given up
    if is_averaged:
        Replicas(replica).follow_growth()
    return replica


def time_of(model: nn.Module, x: torch.Tensor) -> float:
    started = time.perf_counter()
    model.zero_grad()
    model(x).square().mean().backward()
    return time.perf_counter() - started


def measure(rank: int, store: str) -> None:
    """All ranks take the same steps; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, NUM_RANKS), rank=rank, world_size=NUM_RANKS)
    models: tuple[nn.Module, ...]
    models = (DistributedDataParallel(net()), DistributedDataParallel(esper.wrap(net())))
    models += (grown(is_averaged=False), grown(is_averaged=True))
    x = torch.randn(BATCH, WIDTH)
    rounds = [[time_of(model, x) for model in models] for _n in range(WARM_UP + NUM_ROUNDS)][WARM_UP:]
    if rank == 0:
        print(
            f"{DEPTH} x Linear({WIDTH}, {WIDTH}), batch {BATCH} a rank, {NUM_ROUNDS} steps, {NUM_RANKS} ranks on gloo"
        )
        for n, name in enumerate(NAMES):
            low, middle, high = statistics.quantiles([r[n] / r[0] for r in rounds], n=4)
            step_ms = 1000 * statistics.median(r[n] for r in rounds)
            print(f"{name:30} {step_ms:8.2f} ms   {middle:.3f} of plain   (half of them {low:.3f} to {high:.3f})")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [subprocess.Popen([sys.executable, __file__, str(rank), store]) for rank in range(NUM_RANKS)]
        for rank in ranks:
            rank.wait()


if __name__ == "__main__":
    measure(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()
