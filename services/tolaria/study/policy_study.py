"""Policies side by side: the same runs, each trained under every policy, and what they came to.

Owns the plans of a comparison and its arithmetic; who decides is the caller's. Beside the policies stand the network
that never grows (trained without Esper, to the bit the same host), that network on other batches, which is what chance
alone does, and the network that a policy ended with, trained from scratch. Differences are paired by plan.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from esper.config import Settings
from esper.schemas.assets import TrainingResults
from esper.services.tamiyo.evaluation.reward import student_t
from esper.services.tolaria.corpus.training_corpus import RunPlan, Trained, timed
from esper.services.tolaria.counterfactuals.branch_trainer import BranchTrainer
from esper.services.tolaria.training.run_costs import RunCost, cost_of_steps
from esper.services.tolaria.training.trainer import train_plain
from esper.services.tolaria.training.training_loop import accuracy

NEVER_GROWS, OTHER_BATCHES, FROM_SCRATCH = "wait", "placebo", "from scratch"
MIN_PLANS = 5
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over plans and its 95 % interval (Student's t), which supposes that plans are independent.

    Fewer than ``MIN_PLANS`` have no interval.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One policy.

    Attributes:
        accuracy: at the end, a share in 0..1.
        gain: the same less that of the network that never grows, plan by plan.
        parameters, training_flops: as multiples of what that network has and takes, means over plans.
        num_grown: kernels that stand in the network at the end, a plan.
    """

    name: str
    num_plans: int
    accuracy: Mean
    gain: Mean
    parameters: float
    training_flops: float
    num_grown: float


def under(policy: str, plans: Sequence[RunPlan], tag: str) -> list[RunPlan]:
    """The plans as runs of their own. ``tag`` makes their ids new, since no run is ever trained twice."""
    return [replace(plan, run_id=f"{policy}-{tag}-{plan.run_id}") for plan in plans]


def in_order(plans: Sequence[RunPlan], trained: Iterable[Trained]) -> list[Trained]:
    """What became of the plans, in their order."""
    found = {one.plan.run_id: one for one in trained}
    return [found[plan.run_id] for plan in plans]


def from_scratch(trained: Sequence[Trained]) -> list[RunPlan]:
    """The plans of runs, with what stood in their networks at the end from the beginning on."""
    return [replace(one.plan, grown=one.cost.grown if one.cost else ()) for one in trained]


def train_never_growing(plan: RunPlan, settings: Settings) -> Trained:
    """The host alone."""
    return _plain(plan, 0)


def train_on_other_batches(plan: RunPlan, settings: Settings) -> Trained:
    """The host alone, from the same weights, on other batches."""
    return _plain(plan, 1)


def train_from_scratch(plan: RunPlan, settings: Settings) -> Trained:
    """The host with the plan's kernels, which are permanent from the first step."""

    def work() -> tuple[TrainingResults, RunCost]:
        line = BranchTrainer(plan.trainer)
        line.grow_at_once(plan.grown)
        initial = accuracy(line.model, line.data)
        final = line.train(plan.trainer.epochs - 1, lambda _line: ())
        results = TrainingResults(
            initial_accuracy=initial,
            final_accuracy=final,
            adaptations_applied=len(plan.grown),
            overhead_percent=0.0,
            epochs=plan.trainer.epochs,
            steps=line.step,
            duration_s=0.0,
        )
        return results, cost_of_steps(plan.trainer, line.step, plan.grown)

    return timed(plan, work)


def rows_of(outcomes: Mapping[str, Sequence[Trained]]) -> list[Row]:
    """A row for each policy, on the plans that all of them ended.

    Args:
        outcomes: by policy, each in the order of the plans; ``NEVER_GROWS`` is what the others are compared with.
    """
    told = {name: [_told(one) for one in trained] for name, trained in outcomes.items()}
    whole = [group for group in zip(*told.values(), strict=True) if None not in group]
    by_name = {name: [t for t in column if t] for name, column in zip(told, zip(*whole, strict=True), strict=False)}
    return [_row(name, ended, by_name[NEVER_GROWS]) for name, ended in by_name.items()]


def mean_of(values: Sequence[float]) -> Mean:
    """The mean and its interval."""
    value = statistics.fmean(values)
    if len(values) < MIN_PLANS:
        return Mean(value)
    reach = student_t((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(value, value - reach, value + reach)


_Told = tuple[TrainingResults, RunCost]


def _told(one: Trained) -> _Told | None:
    return (one.results, one.cost) if one.results and one.cost else None


def _row(name: str, ended: Sequence[_Told], base: Sequence[_Told]) -> Row:
    final = [results.final_accuracy for results, _cost in ended]
    pairs = list(zip(ended, base, strict=True))
    return Row(
        name,
        len(ended),
        mean_of(final),
        mean_of([own.final_accuracy - other.final_accuracy for (own, _c), (other, _d) in pairs]),
        statistics.fmean(cost.num_parameters / cost.num_parameters_host for _r, cost in ended),
        statistics.fmean(cost.training_flops / other.training_flops for (_r, cost), (_o, other) in pairs),
        statistics.fmean(len(cost.grown) for _r, cost in ended),
    )


def _plain(plan: RunPlan, draw: int) -> Trained:
    def work() -> tuple[TrainingResults, RunCost]:
        results = train_plain(plan.trainer, draw=draw)
        return results, cost_of_steps(plan.trainer, results.steps)

    return timed(plan, work)
