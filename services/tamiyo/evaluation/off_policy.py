"""How good a policy would have been on decisions that another one made (off-policy evaluation). Numpy only.

With b the probability of what was chosen under the policy that acted, c the chance that its outcome was measured, e its
probability under the policy that is judged, r the reward, w = e / (b c), and q a model's guess of the reward:

    SNIPS = sum w r / sum w                                      Swaminathan and Joachims 2015
    DR    = mean(sum_a e(a) q(a) / c + w (r - q)), over mean(1 / c)   Dudik et al. 2011
    ESS   = (sum w)^2 / sum w^2                                  Kish 1965

Intervals are of the (expanded) percentile bootstrap over *runs*: decisions of one run are not independent, runs are.
All policies are judged on the same draws of runs, so differences are paired. Invariant: where the log says too little
of a policy, the verdict says so, and it is not better than anything.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ragged = Sequence[Floats]
"""Of each decision one number for each of its choices."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """When the log says enough, and how sure is sure.

    Attributes:
        min_runs: fewer runs make no interval.
        min_ess: the effective sample size, in decisions.
        max_thin_share: how much of what a policy would do may be of kinds that were tried less than
            ``min_samples`` times.
        level: of the intervals.
        num_draws: of runs, for the intervals.
    """

    min_runs: int = 10
    min_ess: float = 50.0
    min_samples: int = 5
    max_thin_share: float = 0.1
    level: float = 0.95
    num_draws: int = 2_000
    rng_seed: int = 0


@dataclass(frozen=True, slots=True)
class LoggedDecisions:
    """Decisions that were made, and what came of them; one row each.

    Attributes:
        runs: which run it was of.
        chosen: which of its choices was taken.
        behaviour: the probability of that, in (0, 1].
        rewards: what came of it.
        kinds: of each decision the kind of each of its choices, e.g. ``germinate mlp-64``: what support is counted by.
        measured: the chance that the outcome of such a choice was measured, in (0, 1]; 1 where all are.

    Raises:
        ValueError: the rows do not fit together, or a number is outside its range.
    """

    runs: Sequence[str]
    chosen: Sequence[int]
    behaviour: Floats
    rewards: Floats
    kinds: Sequence[Sequence[str]]
    measured: Floats | None = None

    def __post_init__(self) -> None:
        num = len(self.runs)
        columns = (self.chosen, self.behaviour, self.rewards, self.kinds)
        if any(len(column) != num for column in columns) or (self.measured is not None and len(self.measured) != num):
            raise ValueError("every column must have one row a decision")
        for column in (self.behaviour, *(() if self.measured is None else (self.measured,))):
            if not np.all((column > 0.0) & (column <= 1.0)):
                raise ValueError("probabilities of what happened must be in (0, 1]")
        if not np.all(np.isfinite(self.rewards)):
            raise ValueError("rewards must be finite")

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def inverse_measured(self) -> Floats:
        """1 / c."""
        return np.ones(len(self)) if self.measured is None else 1.0 / self.measured

    def of_chosen(self, ragged: Ragged) -> Floats:
        """Of each decision the number of what was chosen."""
        return np.array([row[n] for row, n in zip(ragged, self.chosen, strict=True)], np.float64)


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """A policy to judge: the probability of each choice. ``chosen`` alone is known of the policy that acted."""

    name: str
    chosen: Floats
    probabilities: Ragged | None = None

    @classmethod
    def of(cls, name: str, logged: LoggedDecisions, probabilities: Ragged) -> "TargetPolicy":
        """From the probabilities of all choices of every decision.

        Raises:
            ValueError: they do not sum to 1, or are of another number of choices.
        """
        widths = [len(kinds) for kinds in logged.kinds]
        if [len(row) for row in probabilities] != widths or (widths and not _are_probabilities(probabilities, widths)):
            raise ValueError(f"{name}: every choice needs a probability; they must be at least 0, and sum to 1")
        return cls(name, logged.of_chosen(probabilities), probabilities)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and where the truth lies as a rule; NaN where nothing can be computed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PolicyEstimate:
    """What the log says of one policy.

    Attributes:
        dr: None where there is no model of the reward, or only ``chosen`` is known of the policy.
        thin_share: of what it would do, the share of kinds that were hardly tried.
        refusals: why the log says too little of it; empty where it says enough.
    """

    name: str
    snips: Interval
    dr: Interval | None
    ess: float
    max_weight: float
    thin_share: float
    refusals: tuple[str, ...] = ()

    @property
    def is_supported(self) -> bool:
        """Whether the log says enough of it."""
        return not self.refusals


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better ``name`` is than ``than``, paired run by run. Intervals as in ``PolicyEstimate``."""

    name: str
    than: str
    snips: Interval
    dr: Interval | None
    is_supported: bool

    @property
    def is_better(self) -> bool:
        """The log says enough of both, and every interval that there is lies above 0."""
        intervals = [i for i in (self.snips, self.dr) if i is not None]
        return self.is_supported and all(i.low > 0.0 for i in intervals)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several policies on the same decisions."""

    num_decisions: int
    num_runs: int
    judged: Mapping[str, PolicyEstimate]
    differences: Sequence[Difference] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; what is not known is null."""
        told: dict[str, Any] = _plain(asdict(self))
        for one, judged in self.judged.items():
            told["judged"][one]["is_supported"] = judged.is_supported
        for row, difference in zip(told["differences"], self.differences, strict=True):
            row["is_better"] = difference.is_better
        return told


def _are_probabilities(rows: Ragged, widths: Sequence[int]) -> bool:
    numbers = np.concatenate(rows)
    sums = np.add.reduceat(numbers, np.cumsum([0, *widths[:-1]]))
    return bool(np.all(numbers >= 0.0) and np.allclose(sums, 1.0))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def weights_of(logged: LoggedDecisions, target: TargetPolicy) -> Floats:
    """w, float64 [decisions]; all 1 where the policy is the one that acted, and everything was measured."""
    return target.chosen / logged.behaviour * logged.inverse_measured


def effective_sample_size(weights: Floats) -> float:
    """Kish's; 0 where all weights are."""
    squares = float(np.sum(weights**2))
    return float(np.sum(weights)) ** 2 / squares if squares > 0.0 else 0.0


def thin_share(logged: LoggedDecisions, probabilities: Ragged, min_samples: int) -> float:
    """Of the probability that a policy gives, the share of kinds that were chosen less than ``min_samples`` times."""
    tried = Counter(kinds[n] for kinds, n in zip(logged.kinds, logged.chosen, strict=True))
    if all(tried[kind] >= min_samples for kind in set().union(*map(set, logged.kinds))):
        return 0.0
    thin = sum(
        float(p)
        for row, kinds in zip(probabilities, logged.kinds, strict=True)
        for p, kind in zip(row, kinds, strict=True)
        if tried[kind] < min_samples
    )
    return thin / len(logged)


def compare(
    logged: LoggedDecisions,
    targets: Sequence[TargetPolicy],
    evaluation_settings: EvaluationSettings,
    predicted_rewards: Ragged | None = None,
    candidate: str | None = None,
) -> Comparison:
    """Judge policies on the same decisions.

    Args:
        guesses: a model's reward of every choice. Fit it on other runs than these, or the intervals are too narrow.
        candidate: the policy that is compared with each of the others.
    """
    runs = sorted(set(logged.runs))
    sums = _Sums(logged, runs, evaluation_settings)
    estimates = {t.name: _Estimates(logged, t, predicted_rewards, sums) for t in targets}
    judged = {t.name: _judge(logged, t, estimates[t.name], evaluation_settings, len(runs)) for t in targets}
    differences = [
        _difference(estimates, judged, (candidate, t.name), evaluation_settings, len(runs))
        for t in targets
        if candidate is not None and t.name != candidate
    ]
    return Comparison(len(logged), len(runs), judged, tuple(differences))


class _Sums:
    """Sums over runs, as logged and as drawn: row 0 is the log itself, the others are draws of its runs."""

    def __init__(self, logged: LoggedDecisions, runs: Sequence[str], evaluation_settings: EvaluationSettings) -> None:
        number_of = {name: n for n, name in enumerate(runs)}
        self._run = np.array([number_of[name] for name in logged.runs], np.int64)
        self._num_runs = len(runs)
        rng = np.random.Generator(np.random.PCG64(evaluation_settings.rng_seed))
        shares = np.full(len(runs), 1.0 / max(1, len(runs)))
        drawn = (
            rng.multinomial(len(runs), shares, evaluation_settings.num_draws) if runs else np.zeros((0, 0), np.int64)
        )
        self._times = np.vstack([np.ones(len(runs), np.int64), drawn]).astype(np.float64)

    def of(self, column: Floats) -> Floats:
        """float64 [1 + draws]."""
        by_run = np.bincount(self._run, weights=column, minlength=self._num_runs).astype(np.float64)
        found: Floats = self._times @ by_run
        return found


class _Estimates:
    """SNIPS and DR of one policy on the log, and on every draw."""

    def __init__(
        self, logged: LoggedDecisions, target: TargetPolicy, predicted_rewards: Ragged | None, sums: _Sums
    ) -> None:
        self.weights = weights_of(logged, target)
        self.snips = _ratio(sums.of(self.weights * logged.rewards), sums.of(self.weights))
        self.dr: Floats | None = None
        if predicted_rewards is not None and target.probabilities is not None:
            inverse = logged.inverse_measured
            expected = np.array(
                [p @ q for p, q in zip(target.probabilities, predicted_rewards, strict=True)], np.float64
            )
            rows = expected * inverse + self.weights * (logged.rewards - logged.of_chosen(predicted_rewards))
            self.dr = _ratio(sums.of(rows), sums.of(inverse))


def _ratio(above: Floats, below: Floats) -> Floats:
    found: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0.0)
    return found


def _judge(
    logged: LoggedDecisions,
    target: TargetPolicy,
    estimates: _Estimates,
    evaluation_settings: EvaluationSettings,
    num_runs: int,
) -> PolicyEstimate:
    ess = effective_sample_size(estimates.weights)
    thin = 0.0
    if target.probabilities is not None and len(logged):
        thin = thin_share(logged, target.probabilities, evaluation_settings.min_samples)
    refusals = []
    if num_runs < evaluation_settings.min_runs:
        refusals.append(f"{num_runs} runs, {evaluation_settings.min_runs} are needed")
    if ess < evaluation_settings.min_ess:
        refusals.append(f"effective sample size {ess:.1f}, {evaluation_settings.min_ess:g} are needed")
    if thin > evaluation_settings.max_thin_share:
        refusals.append(
            f"{100 * thin:.0f} % of what it would do was tried less than {evaluation_settings.min_samples} times, "
            f"{100 * evaluation_settings.max_thin_share:g} % are allowed"
        )
    return PolicyEstimate(
        target.name,
        _interval(estimates.snips, evaluation_settings, num_runs),
        None if estimates.dr is None else _interval(estimates.dr, evaluation_settings, num_runs),
        ess,
        float(np.max(estimates.weights, initial=0.0)),
        thin,
        tuple(refusals),
    )


def _difference(
    estimates: Mapping[str, _Estimates],
    judged: Mapping[str, PolicyEstimate],
    names: tuple[str, str],
    evaluation_settings: EvaluationSettings,
    num_runs: int,
) -> Difference:
    mine, other = (estimates[name] for name in names)
    dr = None if mine.dr is None or other.dr is None else _interval(mine.dr - other.dr, evaluation_settings, num_runs)
    is_supported = all(judged[name].is_supported for name in names)
    return Difference(*names, _interval(mine.snips - other.snips, evaluation_settings, num_runs), dr, is_supported)


def _interval(estimates: Floats, evaluation_settings: EvaluationSettings, num_runs: int) -> Interval:
    """Row 0 is the estimate. A draw in which nothing can be computed makes the interval unknown."""
    drawn, tail = estimates[1:], expanded_tail(evaluation_settings.level, num_runs)
    if not len(drawn) or not np.all(np.isfinite(estimates)):
        return Interval(float(estimates[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, (tail, 1.0 - tail))
    return Interval(float(estimates[0]), float(low), float(high))


def expanded_tail(level: float, num_runs: int) -> float:
    """The share of draws to leave out at each side: with few runs a plain percentile interval is too narrow.

    Hesterberg 2015 (What teachers should know about the bootstrap): P(Z < -sqrt(n / (n - 1)) t), with t the quantile
    of Student's t with n - 1 degrees of freedom, here by its expansion around the normal's (Abramowitz and Stegun
    26.7.5; from 10 runs on its error is below 0.001).
    """
    if num_runs < 2:
        return 0.0
    z, free = NormalDist().inv_cdf(0.5 + level / 2.0), num_runs - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return NormalDist().cdf(-t * math.sqrt(num_runs / free))
