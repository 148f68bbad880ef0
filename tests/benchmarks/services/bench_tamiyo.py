"""Cost of the GNN policy: by size of the model, by number of runs in a batch, and by pooling library.

Layers have 4 seeds or 1, and the kernels of 15 blueprints; the network has the size of the shipped one. Layers and
seeds are nodes of the graph: 200 layers with 4 seeds each, or 500 with 1, are 1,000 nodes. "read" converts a view to
arrays, "batch" converts them to tensors, "forward" runs the network, "decide" does all and draws the choice. CPU is the
p50 of this process. Both pooling libraries take turns in one run.

    python tests/benchmarks/services/bench_tamiyo.py --layers 10 200 1000 10000
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.data.random_views import drawn_view

from esper.graph.graph_view import GraphView
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.gnn.gnn_policy import BlueprintVocabulary, GnnPolicy
from esper.services.tamiyo.gnn.graph_batch import GraphBatch
from esper.services.tamiyo.gnn.network import NetworkShape, PolicyNetwork
from esper.services.tamiyo.gnn.pooling import Reduce, Scatter, Wanted, find_scatter, has_torch_scatter
from esper.services.tamiyo.gnn.settings import NetworkSettings
from esper.services.tamiyo.gnn.view_arrays import read_view
from esper.services.tamiyo.policies import EpsilonSoft

METRIC = "val_accuracy"
NUM_BLUEPRINTS = 15
WARM = 3
WAYS: tuple[Wanted, ...] = ("torch-scatter", "torch-geometric") if has_torch_scatter() else ("torch-geometric",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 100, 200, 500, 1000, 10_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 1], help="a layer")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=NetworkSettings.model_validate({}).threads)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, pooling by {' and '.join(WAYS)}")
    by_size(options.layers, options.seeds, options.rounds)
    by_runs(options.runs, options.rounds)
    pooling(options.layers, options.rounds)


def policy(way: Wanted) -> GnnPolicy:
    torch.manual_seed(0)
    names = tuple(f"blueprint-{n}" for n in range(NUM_BLUEPRINTS))
    network = PolicyNetwork(NetworkShape(num_blueprints=len(names)))
    return GnnPolicy(network, BlueprintVocabulary(names), temperature=0.01, options=NetworkSettings(scatter=way))


def wide_view(seed: int, num_layers: int, num_seeds: int = 4) -> GraphView:
    """A view of ``num_layers`` layers with ``num_seeds`` each, all with health signals, decoded from bytes."""
    drawn = drawn_view(
        random.Random(seed), num_layers, seeds_per_layer=num_seeds, num_blueprints=NUM_BLUEPRINTS, run_id=f"run-{seed}",
        unknown=(),
    )  # fmt: skip
    return GraphView.from_bytes(drawn.to_bytes())


def by_size(sizes: Sequence[int], seeds: Sequence[int], rounds: int) -> None:
    print(
        f"\n{'layers':>8}{'seeds':>8}{'choices':>10}  pooling          {'step':8}{'p50 ms':>9}{'p95 ms':>9}{'CPU ms':>9}"
    )
    for size, num_seeds in itertools.product(sizes, seeds):
        view = wide_view(1, size, num_seeds)
        arrays = read_view(view, METRIC)
        for way in WAYS:
            gnn = policy(way)
            batch = gnn._batch([view])
            soft_policy = EpsilonSoft(gnn, 0.05, 0)
            steps: dict[str, Callable[[], Any]] = {
                "read": partial(read_view, view, METRIC),
                "batch": partial(GraphBatch.of, [arrays], {}),
                "forward": partial(torch.inference_mode()(gnn.network), batch),
                "decide": partial(soft_policy.choose, view),
            }
            for name, act in steps.items():
                line = f"{size:>8,}{len(view.seeds):>8,}{len(legal_choices(view)):>10,}  {way:16} {name:8}"
                print(line + "".join(f"{ms:>9.2f}" for ms in timed(act, rounds)), flush=True)


def by_runs(numbers: Sequence[int], rounds: int) -> None:
    """Compare runs of 10 layers each in one batch with one by one, in turns."""
    print(f"\n{'runs':>8}  {'batch ms':>12}{'one by one ms':>15}{'ratio':>8}{'decisions/s':>13}   (p50 of decide)")
    gnn = policy("auto")
    for number in numbers:
        views = [wide_view(n, 10) for n in range(number)]
        choices = [legal_choices(v) for v in views]
        together, apart = [], []
        for _round in range(WARM + max(3, rounds // 3)):
            together.append(seconds(partial(gnn.distributions, views, choices)))
            apart.append(sum(seconds(partial(gnn.distribution, v, c)) for v, c in zip(views, choices, strict=True)))
        fast, slow = median(together[WARM:]), median(apart[WARM:])
        print(
            f"{number:>8}  {1e3 * fast:>12.2f}{1e3 * slow:>15.2f}{slow / fast:>8.1f}{number / fast:>13,.0f}", flush=True
        )


def pooling(sizes: Sequence[int], rounds: int) -> None:
    """Compare the pooling of seeds into layers, 32 features wide, by each library."""
    print(f"\n{'layers':>8}  {'pool':6}" + "".join(f"{way + ' ms':>20}" for way in WAYS) + f"{'ratio':>8}")
    for size in sizes:
        values, segment = torch.randn(4 * size, 32), torch.arange(size).repeat_interleave(4)
        reduce: Reduce
        for reduce in ("sum", "mean", "max"):
            ways = [_alone(way) for way in WAYS]
            times: list[list[float]] = [[] for _way in ways]
            for _round in range(WARM + rounds):
                for scatter, found in zip(ways, times, strict=True):
                    found.append(seconds(partial(scatter, values, segment, size, reduce)))
            medians = [median(found[WARM:]) for found in times]
            ratio = f"{medians[-1] / medians[0]:>8.2f}" if len(medians) > 1 else f"{'-':>8}"
            print(f"{size:>8,}  {reduce:6}" + "".join(f"{1e3 * m:>20.3f}" for m in medians) + ratio, flush=True)


def _alone(way: Wanted) -> Scatter:
    if way != "torch-scatter":
        return find_scatter(way)[1]
    import torch_scatter

    def scatter(values: Tensor, segment: Tensor, num_segments: int, reduce: Reduce) -> Tensor:
        found: Tensor = torch_scatter.scatter(values, segment, dim=0, dim_size=num_segments, reduce=reduce)
        return found

    return scatter


def timed(act: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """p50, p95 and CPU p50 in milliseconds."""
    wall, cpu = [], []
    for _round in range(WARM + rounds):
        began, used = time.perf_counter(), time.process_time()
        act()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    wall, cpu = sorted(wall[WARM:]), sorted(cpu[WARM:])
    return 1e3 * wall[len(wall) // 2], 1e3 * wall[int(0.95 * (len(wall) - 1))], 1e3 * cpu[len(cpu) // 2]


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
