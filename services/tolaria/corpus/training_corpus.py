"""Trains the training corpus: many small networks with different settings, whose runs Tamiyo learns from.

A corpus is not recorded experience but what produces it: each run sends its events over the bus as any other run does,
and a replay of the log makes experiences of them. Owns how the plans of the runs are drawn from a seed, and the
processes that train them. Invariant: plan n of seed s is the same in any process and for any number of plans.
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
from esper.services.tolaria.training.cifar import CIFAR10_FILE, MISSING_PACKAGES
from esper.services.tolaria.training.run_costs import CostLedger, RunCost, host_cost

NUM_TRAINING_DIGITS = 1348
BOUNDARIES_PER_EPOCH = 2
MIN_BOUNDARY_STEPS = 16
"""A health window: with fewer steps a decision would see the window of the one before again."""
HORIZON_EPOCHS = 5
"""A seed takes three epochs to EVALUATING: an earlier horizon shows little."""
CIFAR_SHARE = 0.25
"""Of the plans, where CIFAR-10 is available: its runs take ten times as long."""
HIDDEN, CHANNELS, DEPTHS = (4, 6, 8, 12), (4, 6, 8, 12), (1, 2, 3)
"""Narrow hosts, which can gain from growth, and few widths, since each needs its own kernels."""
HELD_OUT_HIDDEN, HELD_OUT_CHANNELS, HELD_OUT_DEPTHS = (5, 7, 16), (5, 7, 16), (4, 5)
"""Hosts that the corpus never has: policies are tested on them."""
SCHEDULE = {"germinated": 1, "training": 2, "grafting": 2, "stabilizing": 1, "evaluating": 10, "embargo": 2}
"""In boundaries. Nothing times out before the horizon: every cull until then is a decision."""
ADAMW_RATES = {"mlp": (0.003, 0.008), "digits": (0.002, 0.006), "cnn": (0.004, 0.015)}
"""Learning rates by network: it learns, and the order of its batches does not dominate the effect of a fork."""
SGD_RATES, SGD_SHARE = (0.03, 0.1), 0.15


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What all plans of a corpus have in common.

    Attributes:
        seed: of the plans' random numbers; it is part of the runs' ids.
        folder: for what the runs keep on disk.
        min_boundary_interval_s: see ``trainer.min_boundary_interval_s``.
        fork_share: share of germinations that are forked; verdicts have half of it.
        fork_draws: batch orders that a fork is measured on; from 2 on reports have its variance.
        cifar: the folder with CIFAR-10; None leaves it out.
        uses_held_out_hosts: draw the hosts that the corpus never has, to test a policy on them.
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
    """A run to train. ``grown``: germinations that are permanent in its network from the first step."""

    run_id: str
    trainer: TrainerSettings
    grown: tuple[AppliedCommand, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A trained plan: its results and cost, or the error of a run without results. ``cpu_s`` is processor time."""

    plan: RunPlan
    duration_s: float
    cpu_s: float
    results: TrainingResults | None
    cost: RunCost | None = None
    error: str = ""


def find_cifar(folder: Path | None) -> tuple[Path | None, str]:
    """The folder, if CIFAR-10 can be read from it; otherwise None and the reason."""
    if folder is None:
        return None, "no folder was named for CIFAR-10"
    if not (folder / CIFAR10_FILE).exists():
        return None, f"there is no {folder / CIFAR10_FILE}"
    try:
        import PIL  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError:
        return None, MISSING_PACKAGES
    return folder, ""


PlanTrainer = Callable[[RunPlan, Settings], TrainedRun]
"""Trains a plan. It is a module's function, since other processes call it."""


def draw_plan(corpus: CorpusSettings, number: int) -> RunPlan:
    """The plan with this number."""
    seed = f"ground:{corpus.seed}:{number}"  # another text would draw other plans for the same numbers
    rng = random.Random(hashlib.sha256(seed.encode()).digest())
    is_cifar = rng.random() < CIFAR_SHARE and corpus.cifar is not None
    fields = _draw_cifar(rng) if is_cifar else _draw_digits(rng, corpus.uses_held_out_hosts)
    steps_per_epoch = fields.pop("steps_per_epoch")
    common = {
        "rng_seed": rng.randrange(2**31),
        "threads": 1,
        "momentum": 0.9,
        "seeds_per_layer": rng.choice((1, 2)),
        "checkpoint_epochs": 1_000,
        "schedule": SCHEDULE,
        "min_boundary_interval_s": corpus.min_boundary_interval_s,
        "data_folder": corpus.cifar or Path(),
        "fork": {
            "germination_share": corpus.fork_share,
            "verdict_share": corpus.fork_share / 2,
            "horizon_epochs": HORIZON_EPOCHS,
            "num_batch_orders": corpus.fork_draws,
            "max_parallel": 0,
        },
        "link": {
            "boundary_steps": max(MIN_BOUNDARY_STEPS, steps_per_epoch // BOUNDARIES_PER_EPOCH),
            "health_interval_steps": 4,
            "folder": corpus.folder,
        },
    }
    name = "held-out" if corpus.uses_held_out_hosts else "corpus"
    return RunPlan(f"{name}-{corpus.seed}-{number:05d}", TrainerSettings.model_validate({**common, **fields}))


def draw_plans(corpus: CorpusSettings, first: int = 0) -> Iterator[RunPlan]:
    """All plans from a number on, without end."""
    return (draw_plan(corpus, number) for number in itertools.count(first))


def train_plan(plan: RunPlan, settings: Settings) -> TrainedRun:
    """Train one plan in this process, through the bus."""
    from esper.services.tolaria.training.trainer import train

    def work() -> tuple[TrainingResults, RunCost]:
        ledger = CostLedger(plan.trainer, host_cost(plan.trainer))
        _run_id, results = train(plan.trainer, settings, run_id=plan.run_id, observer=ledger)
        return results, ledger.total(results.steps)

    return timed_run(plan, work)


def timed_run(plan: RunPlan, work: Callable[[], tuple[TrainingResults, RunCost]]) -> TrainedRun:
    """Train a plan and measure the time. Its errors are part of the result, and affect no other run."""
    started, started_cpu = time.monotonic(), time.process_time()
    results, cost, message = None, None, ""
    try:
        results, cost = work()
    except EsperError as error:
        message = str(error)
    except Exception as error:  # such as data that cannot be read
        message = f"{type(error).__name__}: {error}"
    return TrainedRun(plan, time.monotonic() - started, time.process_time() - started_cpu, results, cost, message)


def train_corpus(
    corpus: CorpusSettings, settings: Settings, *, num_runs: int, first: int = 0, **options: Any
) -> list[TrainedRun]:
    """Train plans ``first`` to ``first + num_runs - 1``; further arguments as for ``train_plans``."""
    return train_plans(itertools.islice(draw_plans(corpus, first), num_runs), settings, **options)


def train_plans(
    plans: Iterable[RunPlan],
    settings: Settings,
    *,
    train: PlanTrainer = train_plan,
    num_processes: int = 2,
    deadline_s: float | None = None,
    report: Callable[[TrainedRun], None] = lambda _trained: None,
) -> list[TrainedRun]:
    """Train plans in several processes. After the deadline no run starts; those that started are completed.

    Raises:
        UnavailableError: every run failed, or a process was killed from outside.
    """
    started, trained, running, waiting = time.monotonic(), list[TrainedRun](), set[Future[TrainedRun]](), iter(plans)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _initialize_process, (settings,)) as pool:
        while True:
            is_late = deadline_s is not None and time.monotonic() - started > deadline_s
            num_free = 0 if is_late else num_processes - len(running)
            running |= {pool.submit(_train_in_process, train, plan) for plan in itertools.islice(waiting, num_free)}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for run in done:
                trained.append(_result_of(run))
                report(trained[-1])
    if trained and all(t.results is None for t in trained):
        raise UnavailableError(f"all {len(trained)} runs failed; the first: {trained[0].error}")
    return trained


def _result_of(run: Future[TrainedRun]) -> TrainedRun:
    try:
        return run.result()
    except BrokenProcessPool as error:
        raise UnavailableError(
            "a training process was killed, perhaps because memory ran out; use fewer --processes"
        ) from error


_settings: list[Settings] = []  # of a training process, set when it starts


def _initialize_process(settings: Settings) -> None:
    die_with_parent()
    configure_logging(settings.logging)
    _settings[:] = [settings]


def _train_in_process(train: PlanTrainer, plan: RunPlan) -> TrainedRun:
    return train(plan, _settings[0])


def _draw_digits(rng: random.Random, uses_held_out_hosts: bool) -> dict[str, Any]:
    hidden: Sequence[int] = HELD_OUT_HIDDEN if uses_held_out_hosts else HIDDEN
    channels: Sequence[int] = HELD_OUT_CHANNELS if uses_held_out_hosts else CHANNELS
    depths: Sequence[int] = HELD_OUT_DEPTHS if uses_held_out_hosts else DEPTHS
    network = rng.choice(("mlp", "mlp", "cnn", "digits"))
    copies, batch_size = 2, 64
    optimizer = "sgd" if rng.random() < SGD_SHARE else "adamw"
    rate = _log_uniform(rng, *(SGD_RATES if optimizer == "sgd" else ADAMW_RATES[network]))
    return {
        "dataset": "digits",
        "network": network,
        "copies": copies,
        "batch_size": batch_size,
        "epochs": rng.randint(10, 16),
        "channels": rng.choice(channels),
        "hidden": rng.choice(hidden),
        "depth": rng.choice(depths),
        "optimizer": optimizer,
        "learning_rate": rate,
        "steps_per_epoch": copies * (NUM_TRAINING_DIGITS // batch_size),
    }


def _draw_cifar(rng: random.Random) -> dict[str, Any]:
    batch_size, num_images = 64, 4_000
    return {
        "dataset": "cifar10",
        "network": "cnn",
        "copies": 1,
        "batch_size": batch_size,
        "num_images": num_images,
        "epochs": rng.randint(8, 12),
        "channels": rng.choice((8, 12, 16, 24)),
        "depth": 3,
        "optimizer": "adamw",
        "learning_rate": _log_uniform(rng, 0.002, 0.008),
        "steps_per_epoch": num_images * 3 // 4 // batch_size,
    }


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return float(f"{low * (high / low) ** rng.random():.3g}")
