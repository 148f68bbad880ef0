"""What the arrays of seeds cost: a move, a batch, a boundary, a reader, a thread, a device.

Each figure is a median with the range of 80 % of the rounds; ratios come from rounds that alternate the two.
Costs of one thread are its own CPU time, so that a busy machine does not count; threads and devices are timed by the clock.
"""

import contextlib
import copy
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from esper.errors import ConflictError
from esper.kasmina.device_state import BYTES_PER_MOVE, MAY_BECOME, DeviceSeeds, move_fields, move_on_device
from esper.kasmina.lifecycle import StageSchedule
from esper.kasmina.state import SeedArrays
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import STAGE_CODES

D, G, C, T = SeedStage.DORMANT, SeedStage.GERMINATED, SeedStage.CANCELLED, SeedStage.TRAINING
SEEDS = 4
ROUNDS = 30
SCHEDULE = StageSchedule()
DEVICE_SEEDS = {"cuda": 10**7, "cpu": 10**6}


def arrays_of(num_seeds: int) -> SeedArrays:
    return SeedArrays(max(1, num_seeds // SEEDS), min(num_seeds, SEEDS))


def seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _n in range(repeats):
        call()
    return (clock() - began) / repeats


def spread(values: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(values, n=10)
    return statistics.median(values), deciles[0], deciles[-1]


def show(what: str, values: list[float], unit: str, scale: float) -> None:
    median, low, high = (scale * value for value in spread(values))
    print(f"  {what:44} {median:10.3f} {unit:9} (80 % in {low:.3f}..{high:.3f})")


def measure(what: str, call: Callable[[], object], *, repeats: int, per: int = 1, unit: str, scale: float) -> None:
    call()
    show(what, [seconds(call, repeats, time.thread_time) / per for _round in range(ROUNDS)], unit, scale)


def life(arrays: SeedArrays, layer: int = 0) -> None:
    arrays.move(layer, 0, G, step=1, boundary=1)
    arrays.move(layer, 0, C, step=2, boundary=2)
    arrays.move(layer, 0, D, step=3, boundary=3)


def guarded_life(arrays: SeedArrays, layer: int = 0) -> None:
    arrays.move(layer, 0, G, step=1, boundary=1, expected=D)
    arrays.move(layer, 0, C, step=2, boundary=2, expected=G)
    arrays.move(layer, 0, D, step=3, boundary=3, expected=C)


def one_seed() -> None:
    arrays = arrays_of(40)
    print("one seed")
    measure("move", lambda: life(arrays), repeats=5000, per=3, unit="us", scale=1e6)
    measure("move, with the stage expected", lambda: guarded_life(arrays), repeats=5000, per=3, unit="us", scale=1e6)
    measure("stage_of", lambda: arrays.stage_of(0, 0), repeats=10_000, unit="us", scale=1e6)
    values = iter(np.tile(np.linspace(0, 1, 101), 10_000).tolist())
    measure("set_alpha", lambda: arrays.set_alpha(0, 0, next(values)), repeats=5000, unit="us", scale=1e6)


def batches() -> None:
    print("batches, all seeds of the arrays moved")
    for num_seeds in (10, 10**3, 10**6):
        arrays = arrays_of(num_seeds)
        everything = np.ones(arrays.stage.shape, bool)
        indices = np.nonzero(everything)
        for form, where in (("mask", everything), ("indices", indices)):

            def lives(arrays: SeedArrays = arrays, where: object = where) -> None:
                for n, to in enumerate((G, C, D)):
                    arrays.move_where(where, to, step=n, boundary=n)

            repeats = max(1, 3000 // num_seeds)
            measure(
                f"move_where, {num_seeds:,} by {form}",
                lives,
                repeats=repeats,
                per=3 * num_seeds,
                unit="ns/seed",
                scale=1e9,
            )


def boundaries_and_readers() -> None:
    print("boundaries and readers")
    for num_seeds in (10**3, 10**4, 10**5, 10**6):
        arrays = arrays_of(num_seeds)
        repeats = max(1, 10**5 // num_seeds)
        label = f"{num_seeds:,} seeds"
        measure(
            f"due, all dormant, {label}", lambda a=arrays: a.due(9, SCHEDULE), repeats=repeats, unit="us", scale=1e6
        )
        for layer in range(0, len(arrays.stage), 100):
            arrays.move(layer, 0, G, step=9, boundary=9)
        measure(
            f"due, 1 in 400 awake, none due, {label}",
            lambda a=arrays: a.due(9, SCHEDULE),
            repeats=repeats,
            unit="us",
            scale=1e6,
        )
        measure(f"snapshot, nothing changed, {label}", arrays.snapshot, repeats=1000, unit="us", scale=1e6)
        alphas = iter(range(10**6))

        def change(arrays: SeedArrays = arrays, alphas: object = alphas) -> int:
            arrays.set_alpha(0, 0, next(alphas) % 2)
            return arrays.version

        def snapshot(arrays: SeedArrays = arrays, change: Callable[[], int] = change) -> None:
            change()
            arrays.snapshot()

        def follow(arrays: SeedArrays = arrays, change: Callable[[], int] = change) -> None:
            arrays.changes_since(change() - 1)

        measure(f"snapshot, one change, {label}", snapshot, repeats=max(1, repeats // 10), unit="us", scale=1e6)
        measure(f"changes_since, one change, {label}", follow, repeats=repeats, unit="us", scale=1e6)
        measure(
            f"changes_since, nothing, {label}",
            lambda a=arrays: a.changes_since(a.version),
            repeats=repeats,
            unit="us",
            scale=1e6,
        )
    arrays = arrays_of(10**6)
    print(f"  a million seeds take {arrays.num_bytes / 1e6:.1f} MB: {arrays.num_bytes / 10**6:.1f} bytes a seed")
    measure("deepcopy, 1,000 seeds", lambda a=arrays_of(1000): copy.deepcopy(a), repeats=10, unit="us", scale=1e6)


def threads() -> None:
    print("threads that move seeds of one model, each in a layer of its own, beside one thread")
    total = 57_600  # divides by every number of threads

    def rate(num_threads: int, work: Callable[[SeedArrays, int], None]) -> float:
        arrays = SeedArrays(64, 1)
        gate = threading.Barrier(num_threads + 1)

        def run(layer: int) -> None:
            gate.wait()
            for _n in range(total // 3 // num_threads):
                work(arrays, layer)

        workers = [threading.Thread(target=run, args=(n,)) for n in range(num_threads)]
        for worker in workers:
            worker.start()
        gate.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        return total / (time.perf_counter() - began)

    def contended(arrays: SeedArrays, _layer: int) -> None:
        with contextlib.suppress(ConflictError):
            guarded_life(arrays)

    for label, work in (("own layers", guarded_life), ("one seed for all", contended)):
        for num_threads in (4, 16, 64):
            ratios = []
            for _round in range(10):
                ratios.append(rate(num_threads, work) / rate(1, work))
            show(f"{num_threads} threads, {label}", ratios, "of one", 1)


def device(name: str) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        print("device cuda: skipped, this machine has no GPU that torch can use")
        return
    num_seeds = DEVICE_SEEDS[name]
    print(
        f"device {name}, {num_seeds:,} seeds, {BYTES_PER_MOVE} bytes a seed read and written, beside a copy of as much"
    )
    seeds = DeviceSeeds.of(arrays_of(num_seeds).snapshot(), name)
    mask = torch.ones(num_seeds, dtype=torch.bool, device=name)
    source = torch.zeros(num_seeds * BYTES_PER_MOVE // 2, dtype=torch.uint8, device=name)
    target = torch.empty_like(source)
    fused = torch.compile(move_fields)

    def wait(call: Callable[[], object]) -> Callable[[], object]:
        def called() -> None:
            call()
            if name == "cuda":
                torch.cuda.synchronize()

        return called

    arguments = (seeds.stage, seeds.since_step, seeds.since_boundary, mask)
    numbers = tuple(torch.tensor(n) for n in (MAY_BECOME[T], STAGE_CODES[T], 5, 6))
    ways = {
        "copy": lambda: target.copy_(source),
        "move_on_device": lambda: move_on_device(seeds, mask, T, step=5, boundary=6),
        "the same, eager": lambda: move_fields(*arguments, *numbers),
        "the same, compiled": lambda: fused(*arguments, *numbers),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for call in ways.values():
        call()
    for _round in range(ROUNDS):
        for way, call in ways.items():
            times[way].append(seconds(wait(call), 3, time.perf_counter))
    for way, taken in times.items():
        show(way, [num_seeds * BYTES_PER_MOVE / t for t in taken], "GB/s", 1e-9)
        show("", [c / t for t, c in zip(taken, times["copy"], strict=True)], "of copy", 1)


def main() -> None:
    torch.set_num_threads(1)
    one_seed()
    batches()
    boundaries_and_readers()
    threads()
    device("cpu")
    device("cuda")


if __name__ == "__main__":
    main()
