"""Cost of forks: the snapshot in a step, the speed of the run beside a branch, forks per minute.

``python tests/benchmarks/services/bench_forks.py [--rounds 6]``: rounds with and without a branch alternate, so that noise of
the machine affects both.
"""

import argparse
import multiprocessing
import statistics
import time
from typing import Any

import torch
from torch import nn

import esper
from esper.connection.checkpoints.training_state import TrainingState
from esper.kasmina.kernels import build_kernel, load_kernel
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import Action, LayerKind
from esper.services.tolaria.counterfactuals.branch_measurement import ForkJob, measure, measure_packed, pack_job
from esper.services.tolaria.counterfactuals.branch_trainer import (
    AppliedCommand,
    BranchTrainer,
    replay_commands,
    snapshot_of,
)
from esper.services.tolaria.counterfactuals.forks import _initialize_worker
from esper.services.tolaria.settings import TrainerSettings

WIDTHS = (64, 512, 2048)


def trainer_of(epochs: int) -> TrainerSettings:
    """Settings of the demo's network on digits."""
    fields = {"epochs": epochs, "copies": 2, "threads": 1, "link": {"boundary_steps": 42}}
    return TrainerSettings.model_validate(fields)


def job_of(trainer: TrainerSettings, end_of_epoch: int) -> ForkJob:
    """The fork of a germination at the first boundary."""
    import hashlib

    spec = BlueprintSpec(module="mlp", parameters={"width": 64}, targets=(LayerKind.LINEAR,))
    data = build_kernel("mlp-64", spec, LayerKind.LINEAR, trainer.hidden)
    kernel = load_kernel(data, hashlib.sha256(data).hexdigest())
    decided, taken = AppliedCommand(42, Action.GERMINATE, "fc1", 0, kernel), []

    def steer(line: BranchTrainer) -> list[AppliedCommand]:
        if line.step == 42:
            taken.append(line.snapshot())
        return [decided] if line.step == 42 else []

    line = BranchTrainer(trainer)
    value = line.train(end_of_epoch, steer)
    return ForkJob(taken[0], decided, kernel, end_of_epoch, [decided], value, line.step)


def snapshots() -> None:
    """Measure how long a snapshot delays a step, by size of the model."""
    for width in WIDTHS:
        model = esper.wrap(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        training, times = TrainingState(model, optimizer), []
        for _round in range(7):
            began = time.perf_counter()
            snapshot = snapshot_of(training, step=1, epoch=0, step_in_epoch=1)
            times.append(time.perf_counter() - began)
            assert snapshot["step"] == 1
        size = sum(p.numel() for p in model.parameters())
        print(f"snapshot of {size:>9,} parameters with AdamW: {1e3 * statistics.median(times):7.2f} ms")  # fmt: skip


def epochs(rounds: int) -> None:
    """Measure epochs of the run alone, and while another process trains a branch."""
    trainer = trainer_of(40)
    job = pack_job(job_of(trainer, 12))
    own: dict[bool, list[float]] = {False: [], True: []}
    with multiprocessing.get_context("spawn").Pool(1, _initialize_worker) as pool:
        pool.apply(measure_packed, (trainer, job))  # warm-up
        for number in range(2 * rounds):
            is_beside = number % 2 == 1
            running: Any = pool.apply_async(measure_packed, (trainer, job)) if is_beside else None
            line = BranchTrainer(trainer)
            began = time.perf_counter()
            line.train(0, replay_commands([]))
            own[is_beside].append((time.perf_counter() - began) / line.step)
            if running is not None:
                print(f"  the branch {'ended before the run' if running.ready() else 'ran throughout'}")
                running.get()
    alone, beside = (1e3 * statistics.median(own[key]) for key in (False, True))
    print(f"a step of the run: {alone:.3f} ms alone, {beside:.3f} ms beside a branch: {beside / alone:.3f} times "
          f"(medians of {rounds} rounds each, in turns)")  # fmt: skip


def labels() -> None:
    """Measure forks in this process, without a bus."""
    trainer = trainer_of(5)
    job = job_of(trainer, 3)
    began, count = time.perf_counter(), 3
    for _n in range(count):
        measured = measure(trainer, job)
    took = (time.perf_counter() - began) / count
    print(f"a fork over {measured.fork.horizon_steps} steps takes {took:.2f} s: {60 / took:.0f} per minute and core")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    snapshots()
    labels()
    epochs(parser.parse_args().rounds)
