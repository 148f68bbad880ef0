"""The honest reward of a decision: what it gained against the fork that decided otherwise, less rent.

Owns the arithmetic; docs/design/reward.md derives it. Pure. Gains, rewards and deviations are in the metric's own unit (a
share in 0..1 for an accuracy).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from esper.schemas.enums import Action, SeedStage
from esper.schemas.events import FieldReported
from esper.services.tamiyo.settings import RentSettings

MIN_DIFFERENCES = 5
"""Fewer placebos say next to nothing about a spread: with 5 its 95 % interval spans a factor of almost 5."""


def reward(
    gain: float,
    num_parameters_added: int,
    num_parameters_host: int,
    flops_added: int,
    flops_host: int,
    rent: RentSettings,
) -> float:
    """Gain less rent: gain - rent.parameters * P_added / P_host - rent.flops * F_added / F_host.

    Args:
        gain: metric with the adaptation less metric without it, at the horizon.
        num_parameters_added, num_parameters_host: of what was added, and of the model without any seed.
        flops_added, flops_host: of one forward pass over one sample, likewise.

    Raises:
        ValueError: a size is negative, the host's is zero, or the gain is not finite.
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
    """The reward of the decision that a fork measured, and its estimated variance (None where one draw was made).

    None where there is nothing to learn from: the report is no fork, or a metric is missing. Rent is owed for what
    stands at the horizon; what the run gave up by then owes none. The reward of a cull is that of
    keeping, negated: rent that is not paid is won. A placebo's true gain is zero, so its reward is: its difference
    tells of noise alone, and goes to ``noise_floor``.

    Args:
        action: what was decided; the report's ``decision_id`` says which decision it is of.

    Raises:
        ValueError: a WAIT is never forked.
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
    """How far differences spread where the true one is zero.

    Attributes:
        num_differences: placebos that it is estimated from.
        mean: of the differences; 0 but for chance.
        sd, sd_low, sd_high: their standard deviation, and its 95 % interval.
        low, high: the 95 % interval of one more placebo's difference: an adaptation whose difference
            lies above ``high`` helped beyond the floor.
    """

    num_differences: int
    mean: float
    sd: float
    sd_low: float
    sd_high: float
    low: float
    high: float


def noise_floor(differences: Sequence[float]) -> NoiseFloor:
    """The floor from the differences of placebos, each of one draw or as of one; docs/design/reward.md has the formulas.

    Raises:
        ValueError: fewer than ``MIN_DIFFERENCES``, or one is not finite.
    """
    count = len(differences)
    if count < MIN_DIFFERENCES:
        raise ValueError(f"{count} placebo(s): at least {MIN_DIFFERENCES} are needed; let more runs germinate a noop")
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("a placebo's difference is not finite: leave out those whose metric is missing")
    mean = math.fsum(differences) / count
    squares = math.fsum((d - mean) ** 2 for d in differences)
    sd = math.sqrt(squares / (count - 1))
    reach = student_t(0.975, count - 1) * sd * math.sqrt(1.0 + 1.0 / count)
    low, high = (math.sqrt(squares / chi_square(p, count - 1)) for p in (0.975, 0.025))
    return NoiseFloor(count, mean, sd, low, high, mean - reach, mean + reach)


def paired_floor(variances: Sequence[float]) -> float:
    """What a reward must exceed to have *helped beyond the paired floor*: t(0.975, n) sqrt(mean of the variances).

    Args:
        variances: of n rewards' estimates, each from the draws of one fork (``FieldReported.fork.variance``). Those of
            0 are left out: nothing was added by the horizon, or the draws happen to agree. So the floor is too high
            rather than too low, as it is by counting one degree of freedom a fork, where three draws have two.

    Raises:
        ValueError: fewer than ``MIN_DIFFERENCES`` that are not 0.
    """
    found = [v for v in variances if v > 0.0]
    if len(found) < MIN_DIFFERENCES:
        raise ValueError(f"{len(found)} fork(s) of several draws: at least {MIN_DIFFERENCES} are needed")
    return student_t(0.975, len(found)) * math.sqrt(math.fsum(found) / len(found))


def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by the expansion of Abramowitz and Stegun 26.7.5; within 0.5 % from 4 degrees on."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum([z, *(term / math.pow(freedom, n + 1) for n, term in enumerate(terms))])


def chi_square(probability: float, freedom: int) -> float:
    """Quantile of chi-square, by Wilson and Hilferty (Abramowitz and Stegun 26.4.17).

    Within 8 % from 4 degrees on, within 1 % from 9 on.
    """
    z, share = NormalDist().inv_cdf(probability), 2.0 / (9.0 * freedom)
    return freedom * math.pow(1.0 - share + z * math.sqrt(share), 3)
