"""The training ground: many small runs, all different, each drawn from a number; they go through the real bus.

Owns the drawing of plans and the processes that train them. Invariant: plan n of seed s is the same
in any process and for any number of plans.
"""

import hashlib
import itertools
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.config import Settings
from esper.embedded.processes import die_with_parent
from esper.errors import EsperError, UnavailableError
from esper.logging import configure_logging
from esper.schemas.assets import TrainingResults
from esper.services.tolaria.counterfactuals.branch_trainer import AppliedCommand
from esper.services.tolaria.settings import TrainerSettings
from esper.services.tolaria.training.cifar import FILE
from esper.services.tolaria.training.run_costs import CostLedger, RunCost, host_cost

DIGITS_IN_TRAINING = 1348
BOUNDARIES_IN_EPOCH = 2
MIN_BOUNDARY_STEPS = 16
"""A health window: with fewer steps a decision would see the one before it again."""
HORIZON_EPOCHS = 5
"""A seed takes three epochs to EVALUATING: sooner there is little to see."""
CIFAR_SHARE = 0.25
"""Of the plans, where CIFAR-10 is there: its runs take ten times as long."""
HIDDEN, CHANNELS, DEPTHS = (4, 6, 8, 12), (4, 6, 8, 12), (1, 2, 3)
"""Narrow hosts, which have something to gain from growth, and few widths, since each needs kernels of its own."""
OTHER_HIDDEN, OTHER_CHANNELS, OTHER_DEPTHS = (5, 7, 16), (5, 7, 16), (4, 5)
"""Hosts that the ground never draws: what was learnt there is tried on them."""
SCHEDULE = {"germinated": 1, "training": 2, "grafting": 2, "stabilizing": 1, "evaluating": 10, "embargo": 2}
"""In boundaries. Nothing times out before the horizon: what is given up by then was given up by a decision."""
RATES = {"mlp": (0.003, 0.008), "digits": (0.002, 0.006), "cnn": (0.004, 0.015)}
"""Of AdamW, by network: where it learns, and its batches do not decide what a fork shows."""
SGD_RATES, SGD_SHARE = (0.03, 0.1), 0.15


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What all plans of a ground have in common.

    Attributes:
        seed: where the plans' chance starts; it is in the runs' names.
        folder: gets what the runs keep on disk.
        min_boundary_interval_s: see ``trainer.min_boundary_interval_s``.
        fork_share: of germinations that are forked; verdicts half as often.
        fork_draws: batch orders that a fork is measured on; from 2 on reports tell its variance.
        cifar: the folder with CIFAR-10; None leaves it out.
        uses_held_out_hosts: draw the hosts that are kept apart, to try a policy on.
    """

    seed: int
    folder: Path
    min_boundary_interval_s: float = 0.3
    fork_share: float = 1.0
    fork_draws: int = 1
    cifar: Path | None = None
    uses_held_out_hosts: bool = False


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One run that is to be trained. ``grown``: kernels that stand in its network from the beginning."""

    run_id: str
    trainer: TrainerSettings
    grown: tuple[AppliedCommand, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """What became of a plan: results and what they cost, or why there are none. ``cpu_s`` is time of the processor."""

    plan: RunPlan
    duration_s: float
    cpu_s: float
    results: TrainingResults | None
    cost: RunCost | None = None
    problem: str = ""


def find_cifar(folder: Path | None) -> tuple[Path | None, str]:
    """The folder, if CIFAR-10 can be read from it; else None and the reason."""
    if folder is None:
        return None, "no folder was named for CIFAR-10"
    if not (folder / FILE).exists():
        return None, f"there is no {folder / FILE}"
    try:
        import PIL  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError:
        return None, f"reading {FILE} needs pyarrow and Pillow: pip install 'esper[images]'"
    return folder, ""


PlanTrainer = Callable[[RunPlan, Settings], TrainedRun]
"""Trains a plan; a function of a module, since it is called in other processes."""


def plan_of(ground: CorpusSettings, number: int) -> RunPlan:
    """The plan with this number."""
    named = f"ground:{ground.seed}:{number}"
    chance = random.Random(hashlib.sha256(named.encode()).digest())
    is_cifar = chance.random() < CIFAR_SHARE and ground.cifar is not None
    fields = _cifar(chance) if is_cifar else _digits(chance, ground.uses_held_out_hosts)
    steps = fields.pop("steps_in_epoch")
    common = {
        "rng_seed": chance.randrange(2**31),
        "threads": 1,
        "momentum": 0.9,
        "seeds_per_layer": chance.choice((1, 2)),
        "checkpoint_epochs": 1_000,
        "schedule": SCHEDULE,
        "min_boundary_interval_s": ground.min_boundary_interval_s,
        "data_folder": ground.cifar or Path(),
        "fork": {
            "germination_share": ground.fork_share,
            "verdict_share": ground.fork_share / 2,
            "horizon_epochs": HORIZON_EPOCHS,
            "num_batch_orders": ground.fork_draws,
            "max_parallel": 0,
        },
        "link": {
            "boundary_steps": max(MIN_BOUNDARY_STEPS, steps // BOUNDARIES_IN_EPOCH),
            "health_every_steps": 4,
            "folder": ground.folder,
        },
    }
    name = "hosts" if ground.uses_held_out_hosts else "ground"
    return RunPlan(f"{name}-{ground.seed}-{number:05d}", TrainerSettings.model_validate({**common, **fields}))


def plans(ground: CorpusSettings, first: int = 0) -> Iterator[RunPlan]:
    """All plans from a number on; there is no last one."""
    number = first
    while True:
        yield plan_of(ground, number)
        number += 1


def train_plan(plan: RunPlan, settings: Settings) -> TrainedRun:
    """Train one plan in this process, through the bus."""
    from esper.services.tolaria.training.trainer import train

    def work() -> tuple[TrainingResults, RunCost]:
        ledger = CostLedger(plan.trainer, host_cost(plan.trainer))
        _run_id, results = train(plan.trainer, settings, run_id=plan.run_id, observer=ledger)
        return results, ledger.total(results.steps)

    return timed(plan, work)


def timed(plan: RunPlan, work: Callable[[], tuple[TrainingResults, RunCost]]) -> TrainedRun:
    """What became of a plan; an error is what became of it, and costs no other run anything."""
    began, busy = time.monotonic(), time.process_time()
    results, cost, problem = None, None, ""
    try:
        results, cost = work()
    except EsperError as error:
        problem = str(error)
    except Exception as error:  # of data that cannot be read, say
        problem = f"{type(error).__name__}: {error}"
    return TrainedRun(plan, time.monotonic() - began, time.process_time() - busy, results, cost, problem)


def train_corpus(
    ground: CorpusSettings, settings: Settings, *, num_runs: int, first: int = 0, **more: Any
) -> list[TrainedRun]:
    """Train plans ``first`` to ``first + num_runs - 1`` of a ground; more arguments as for ``train_plans``."""
    return train_plans(itertools.islice(plans(ground, first), num_runs), settings, **more)


def train_plans(
    coming: Iterable[RunPlan],
    settings: Settings,
    *,
    how: PlanTrainer = train_plan,
    num_processes: int = 2,
    deadline_s: float | None = None,
    report: Callable[[TrainedRun], None] = lambda _trained: None,
) -> list[TrainedRun]:
    """Train plans, several at once, in processes of their own; those that began before the deadline end.

    Raises:
        UnavailableError: no run could be trained at all, or a process was killed from outside.
    """
    began, trained, under_way, waiting = time.monotonic(), list[TrainedRun](), set[Future[TrainedRun]](), iter(coming)
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, spawning, _begin_process, (settings,)) as pool:
        while True:
            is_late = deadline_s is not None and time.monotonic() - began > deadline_s
            room = 0 if is_late else num_processes - len(under_way)
            under_way |= {pool.submit(_train_here, how, plan) for plan in itertools.islice(waiting, room)}
            if not under_way:
                break
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for one in done:
                trained.append(_ended(one))
                report(trained[-1])
    if trained and all(t.results is None for t in trained):
        raise UnavailableError(f"none of {len(trained)} runs could be trained; the first: {trained[0].problem}")
    return trained


def _ended(run: Future[TrainedRun]) -> TrainedRun:
    try:
        return run.result()
    except BrokenProcessPool as error:
        raise UnavailableError(
            "a process that trained was killed, perhaps for want of memory: take fewer --processes"
        ) from error


_settings: list[Settings] = []  # of a process of the ground: what it was begun with


def _begin_process(settings: Settings) -> None:
    die_with_parent()
    configure_logging(settings.logging)
    _settings[:] = [settings]


def _train_here(how: PlanTrainer, plan: RunPlan) -> TrainedRun:
    return how(plan, _settings[0])


def _digits(chance: random.Random, uses_held_out_hosts: bool) -> dict[str, Any]:
    hidden: Sequence[int] = OTHER_HIDDEN if uses_held_out_hosts else HIDDEN
    channels: Sequence[int] = OTHER_CHANNELS if uses_held_out_hosts else CHANNELS
    depths: Sequence[int] = OTHER_DEPTHS if uses_held_out_hosts else DEPTHS
    network = chance.choice(("mlp", "mlp", "cnn", "digits"))
    copies, batch_size = 2, 64
    optimizer = "sgd" if chance.random() < SGD_SHARE else "adamw"
    rate = _log_uniform(chance, *(SGD_RATES if optimizer == "sgd" else RATES[network]))
    return {
        "dataset": "digits",
        "network": network,
        "copies": copies,
        "batch_size": batch_size,
        "epochs": chance.randint(10, 16),
        "channels": chance.choice(channels),
        "hidden": chance.choice(hidden),
        "depth": chance.choice(depths),
        "optimizer": optimizer,
        "learning_rate": rate,
        "steps_in_epoch": copies * (DIGITS_IN_TRAINING // batch_size),
    }


def _cifar(chance: random.Random) -> dict[str, Any]:
    batch_size, num_images = 64, 4_000
    return {
        "dataset": "cifar10",
        "network": "cnn",
        "copies": 1,
        "batch_size": batch_size,
        "num_images": num_images,
        "epochs": chance.randint(8, 12),
        "channels": chance.choice((8, 12, 16, 24)),
        "depth": 3,
        "optimizer": "adamw",
        "learning_rate": _log_uniform(chance, 0.002, 0.008),
        "steps_in_epoch": num_images * 3 // 4 // batch_size,
    }


def _log_uniform(chance: random.Random, low: float, high: float) -> float:
    return float(f"{low * (high / low) ** chance.random():.3g}")
