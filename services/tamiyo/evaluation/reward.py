"""The reward of a decision: its gain over the fork that decided otherwise, less rent for what it added.

Owns the arithmetic; docs/design/reward.md derives it. Pure. Gains, rewards and deviations are in units of the metric (a
share in 0..1 for an accuracy).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esper.schemas.enums import Action, SeedStage
from esper.schemas.events import FieldReported
from esper.services.tamiyo.settings import RentSettings

MIN_DIFFERENCES = 5
"""Least number of differences for a spread: with 5, its 95 % interval spans a factor of almost 5."""


def reward(
    gain: float,
    num_parameters_added: int,
    num_parameters_host: int,
    flops_added: int,
    flops_host: int,
    rent: RentSettings,
) -> float:
    """Return gain - rent.parameters * P_added / P_host - rent.flops * F_added / F_host.

    Args:
        gain: metric with the adaptation less metric without it, at the horizon.
        num_parameters_added, num_parameters_host: of the addition, and of the model without any seed.
        flops_added, flops_host: of one forward pass over one sample, likewise.

    Raises:
        ValueError: a size is negative, a size of the host is zero, or the gain is not finite.
    """
    if not math.isfinite(gain):
        raise ValueError(f"the gain must be a finite number, not {gain}")
    if min(num_parameters_added, flops_added) < 0 or min(num_parameters_host, flops_host) < 1:
        raise ValueError(
            f"sizes must not be negative, those of a host not zero: {num_parameters_added} parameters on "
            f"{num_parameters_host}, {flops_added} FLOPs on {flops_host}"
        )
    parameters, flops = num_parameters_added / num_parameters_host, flops_added / flops_host
    return gain - rent.parameters * parameters - rent.flops * flops


def reward_of(report: FieldReported, action: Action, rent: RentSettings) -> tuple[float, float | None] | None:
    """Return the reward of the decision that a fork measured, and its estimated variance (None for a single draw).

    None if there is nothing to learn from: the report is no fork, or a metric is missing. Rent is charged for what
    exists at the horizon; a seed that was given up by then costs none. The reward of a cull is that of keeping,
    negated: it gains the rent that is no longer paid. The true gain of a placebo is zero, and so is its reward: its
    difference measures noise, which ``noise_floor`` takes.

    Args:
        action: the decided action; the report's ``decision_id`` names the decision.

    Raises:
        ValueError: the action is WAIT, which is never forked.
    """
    fork = report.fork
    if action is Action.WAIT:
        raise ValueError("a WAIT is never forked: its reward is 0 by definition")
    if fork is None or report.before is None or report.after is None:
        return None
    if fork.is_placebo:
        return 0.0, 0.0
    is_standing = action is not Action.GERMINATE or report.outcome not in (SeedStage.CULLED, SeedStage.CANCELLED)
    of_keeping = reward(
        report.after - report.before,
        report.num_parameters if is_standing else 0,
        fork.num_parameters_host,
        fork.flops_added if is_standing else 0,
        fork.flops_host,
        rent,
    )
    return (-of_keeping if action is Action.CULL else of_keeping), fork.variance


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The spread of differences whose true value is zero.

    Attributes:
        num_differences: number of placebos that it is estimated from.
        mean: of the differences; 0 except for chance.
        sd, sd_low, sd_high: their standard deviation, and its 95 % interval.
        low, high: 95 % prediction interval of one more placebo's difference. An adaptation whose difference lies above
            ``high`` helped beyond the floor.
    """

    num_differences: int
    mean: float
    sd: float
    sd_low: float
    sd_high: float
    low: float
    high: float


def noise_floor(differences: Sequence[float]) -> NoiseFloor:
    """Estimate the floor from the differences of placebos, each scaled to a single draw.

    docs/design/reward.md has the formulas.

    Raises:
        ValueError: there are fewer than ``MIN_DIFFERENCES``, or one is not finite.
    """
    from scipy import stats  # imported here: it takes a second or more, and most commands do not need it

    count = len(differences)
    if count < MIN_DIFFERENCES:
        raise ValueError(f"{count} placebo(s): at least {MIN_DIFFERENCES} are needed; let more runs germinate a noop")
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("a placebo's difference is not finite: leave out those whose metric is missing")
    mean = math.fsum(differences) / count
    squares = math.fsum((d - mean) ** 2 for d in differences)
    sd = math.sqrt(squares / (count - 1))
    reach = float(stats.t.ppf(0.975, count - 1)) * sd * math.sqrt(1.0 + 1.0 / count)
    low, high = (math.sqrt(squares / stats.chi2.ppf(p, count - 1)) for p in (0.975, 0.025))
    return NoiseFloor(count, mean, sd, low, high, mean - reach, mean + reach)


def paired_floor(variances: Sequence[float]) -> float:
    """Return what a reward must exceed to have *helped beyond the paired floor*: t(0.975, n) sqrt(mean variance).

    Args:
        variances: of the estimates of n rewards, each from the draws of one fork (``FieldReported.fork.variance``).
            Zeros are left out: nothing was added by the horizon, or the draws agree by chance. Leaving them out, and
            counting one degree of freedom per fork where three draws have two, makes the floor too high rather than
            too low.

    Raises:
        ValueError: fewer than ``MIN_DIFFERENCES`` are not 0.
    """
    from scipy import stats

    found = [v for v in variances if v > 0.0]
    if len(found) < MIN_DIFFERENCES:
        raise ValueError(f"{len(found)} fork(s) of several draws: at least {MIN_DIFFERENCES} are needed")
    return float(stats.t.ppf(0.975, len(found))) * math.sqrt(math.fsum(found) / len(found))
