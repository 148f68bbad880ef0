"""Compares policies: the same runs, each trained under every policy, and their results.

Owns the plans of a comparison and its arithmetic; the caller runs the policies. The baselines are the network that
never grows (trained without Esper, the same host to the bit), that network on other batches, which shows the effect of
chance alone, and the network that a policy ended with, trained from scratch. Differences are paired by plan.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from esper.config import Settings
from esper.schemas.assets import TrainingResults
from esper.services.tolaria.corpus.training_corpus import RunPlan, TrainedRun, timed_run
from esper.services.tolaria.counterfactuals.branch_trainer import BranchTrainer
from esper.services.tolaria.training.run_costs import RunCost, cost_of_steps
from esper.services.tolaria.training.trainer import train_baseline
from esper.services.tolaria.training.training_loop import accuracy

NEVER_GROWS, OTHER_BATCHES, FROM_SCRATCH = "wait", "placebo", "from scratch"
MIN_PLANS = 5
CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over plans and its 95 % interval (Student's t), which assumes independent plans.

    Fewer than ``MIN_PLANS`` have no interval.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """The results of one policy.

    Attributes:
        accuracy: at the end, a fraction in 0..1.
        gain: the accuracy minus that of the network that never grows, paired by plan.
        parameters, training_flops: as multiples of that network's, means over plans.
        num_grown: mean number of kernels in the network at the end.
    """

    name: str
    num_plans: int
    accuracy: Mean
    gain: Mean
    parameters: float
    training_flops: float
    num_grown: float


def plans_under_policy(policy: str, plans: Sequence[RunPlan], tag: str) -> list[RunPlan]:
    """The plans as separate runs. ``tag`` makes their ids new, since no run is trained twice."""
    return [replace(plan, run_id=f"{policy}-{tag}-{plan.run_id}") for plan in plans]


def in_plan_order(plans: Sequence[RunPlan], trained: Iterable[TrainedRun]) -> list[TrainedRun]:
    """The trained runs in the order of their plans."""
    by_id = {run.plan.run_id: run for run in trained}
    return [by_id[plan.run_id] for plan in plans]


def from_scratch_plans(trained: Sequence[TrainedRun]) -> list[RunPlan]:
    """The plans of runs, with the kernels of their final networks from the first step."""
    return [replace(run.plan, grown=run.cost.grown if run.cost else ()) for run in trained]


def train_never_growing(plan: RunPlan, settings: Settings) -> TrainedRun:
    """Train the host alone."""
    return _train_host(plan, 0)


def train_on_other_batches(plan: RunPlan, settings: Settings) -> TrainedRun:
    """Train the host alone, from the same weights, on other batches."""
    return _train_host(plan, 1)


def train_from_scratch(plan: RunPlan, settings: Settings) -> TrainedRun:
    """Train the host with the plan's kernels, which are permanent from the first step."""

    def work() -> tuple[TrainingResults, RunCost]:
        branch = BranchTrainer(plan.trainer)
        branch.grow_from_start(plan.grown)
        initial = accuracy(branch.model, branch.data)
        final = branch.train(plan.trainer.epochs - 1, lambda _branch: ())
        results = TrainingResults(
            initial_accuracy=initial,
            final_accuracy=final,
            adaptations_applied=len(plan.grown),
            overhead_percent=0.0,
            epochs=plan.trainer.epochs,
            steps=branch.step,
            duration_s=0.0,
        )
        return results, cost_of_steps(plan.trainer, branch.step, plan.grown)

    return timed_run(plan, work)


def policy_results(trained: Mapping[str, Sequence[TrainedRun]]) -> list[PolicyResult]:
    """The result of each policy, over the plans that succeeded under all of them.

    Args:
        trained: by policy, each in the order of the plans; the others are compared with ``NEVER_GROWS``.
    """
    finished = {name: [_finished(run) for run in runs] for name, runs in trained.items()}
    complete = [group for group in zip(*finished.values(), strict=True) if None not in group]
    columns = zip(finished, zip(*complete, strict=True), strict=False)
    by_name = {name: [run for run in column if run] for name, column in columns}
    return [_policy_result(name, runs, by_name[NEVER_GROWS]) for name, runs in by_name.items()]


def mean_with_interval(values: Sequence[float]) -> Mean:
    """The mean and its interval."""
    from scipy import stats  # takes a second to import, which commands without statistics must not pay

    value = statistics.fmean(values)
    if len(values) < MIN_PLANS:
        return Mean(value)
    quantile = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, len(values) - 1))
    reach = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(value, value - reach, value + reach)


_Finished = tuple[TrainingResults, RunCost]


def _finished(run: TrainedRun) -> _Finished | None:
    return (run.results, run.cost) if run.results and run.cost else None


def _policy_result(name: str, runs: Sequence[_Finished], baseline: Sequence[_Finished]) -> PolicyResult:
    pairs = list(zip(runs, baseline, strict=True))
    return PolicyResult(
        name,
        len(runs),
        mean_with_interval([results.final_accuracy for results, _cost in runs]),
        mean_with_interval([own.final_accuracy - other.final_accuracy for (own, _c), (other, _d) in pairs]),
        statistics.fmean(cost.num_parameters / cost.num_parameters_host for _r, cost in runs),
        statistics.fmean(cost.training_flops / other.training_flops for (_r, cost), (_o, other) in pairs),
        statistics.fmean(len(cost.grown) for _r, cost in runs),
    )


def _train_host(plan: RunPlan, draw: int) -> TrainedRun:
    def work() -> tuple[TrainingResults, RunCost]:
        results = train_baseline(plan.trainer, draw=draw)
        return results, cost_of_steps(plan.trainer, results.steps)

    return timed_run(plan, work)
