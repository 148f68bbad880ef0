"""Off-policy evaluation: how good a policy would have been on decisions that another policy made.

With b the probability of the logged choice under the behaviour policy, c the probability that its outcome was measured,
e its probability under the target policy, r the reward, w = e / (b c), and q a model of the reward:

    SNIPS = sum w r / sum w                                      Swaminathan and Joachims 2015
    DR    = mean(sum_a e(a) q(a) / c + w (r - q)), over mean(1 / c)   Dudik et al. 2011
    ESS   = (sum w)^2 / sum w^2                                  Kish 1965

Intervals come from the (expanded) percentile bootstrap over *runs*: decisions of one run are not independent, runs are.
All policies are evaluated on the same draws of runs, so differences are paired. Invariant: if the log supports too
little of a policy, its estimate says why, and it is not better than any other.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ragged = Sequence[Floats]
"""For each decision one number per choice."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """When the log supports an estimate, and how intervals are made.

    Attributes:
        min_runs: least number of runs for an interval.
        min_ess: least effective sample size, in decisions.
        min_samples: how often a kind of choice must be in the log to be supported.
        max_thin_share: largest probability that a policy may give to kinds without support.
        level: confidence level of the intervals.
        num_draws: bootstrap draws of runs.
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
    """Decisions of the behaviour policy and their outcomes, one row each.

    Attributes:
        runs: the run of each decision.
        chosen: the index of the choice that was made.
        behaviour: its probability, in (0, 1].
        rewards: its reward.
        kinds: for each decision the kind of each choice, e.g. ``germinate mlp-64``, by which support is counted.
        measured: the probability that the outcome of such a choice was measured, in (0, 1]; 1 by default.

    Raises:
        ValueError: columns differ in length, or a number is outside its range.
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
            raise ValueError("every column must have one row for each decision")
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
        """Return each decision's number for the logged choice."""
        return np.array([row[n] for row, n in zip(ragged, self.chosen, strict=True)], np.float64)


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """A policy to evaluate: its probability of each choice, or of the logged ones (``chosen``) alone."""

    name: str
    chosen: Floats
    probabilities: Ragged | None = None

    @classmethod
    def of(cls, name: str, logged: LoggedDecisions, probabilities: Ragged) -> "TargetPolicy":
        """Make one from the probabilities of all choices of every decision.

        Raises:
            ValueError: they do not sum to 1, or their number is not that of the choices.
        """
        widths = [len(kinds) for kinds in logged.kinds]
        if [len(row) for row in probabilities] != widths or (widths and not _are_probabilities(probabilities, widths)):
            raise ValueError(f"{name}: every choice needs a probability; they must be at least 0, and sum to 1")
        return cls(name, logged.of_chosen(probabilities), probabilities)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval; NaN where it cannot be computed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PolicyEstimate:
    """The estimates for one policy.

    Attributes:
        dr: None without a model of the reward, or if only ``chosen`` is known of the policy.
        thin_share: the probability that the policy gives to kinds without support.
        refusals: why the log supports too little of the policy; empty if it supports enough.
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
        """Whether the log supports the estimates."""
        return not self.refusals


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better ``name`` is than ``than``, paired by run. Intervals as in ``PolicyEstimate``."""

    name: str
    than: str
    snips: Interval
    dr: Interval | None
    is_supported: bool

    @property
    def is_better(self) -> bool:
        """Whether both policies are supported and every interval lies above 0."""
        intervals = [i for i in (self.snips, self.dr) if i is not None]
        return self.is_supported and all(i.low > 0.0 for i in intervals)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several policies on the same decisions."""

    num_decisions: int
    num_runs: int
    estimates: Mapping[str, PolicyEstimate]
    differences: Sequence[Difference] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON for a policy's card; unknown numbers are null."""
        judged = {n: {**_plain(asdict(e)), "is_supported": e.is_supported} for n, e in self.estimates.items()}
        differences = [{**_plain(asdict(d)), "is_better": d.is_better} for d in self.differences]
        counts = {"num_decisions": self.num_decisions, "num_runs": self.num_runs}
        return {**counts, "judged": judged, "differences": differences}


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
    """Return the importance weights w, (N,); all 1 for the behaviour policy if everything was measured."""
    return target.chosen / logged.behaviour * logged.inverse_measured


def effective_sample_size(weights: Floats) -> float:
    """Return Kish's effective sample size; 0 if all weights are 0."""
    squares = float(np.sum(weights**2))
    return float(np.sum(weights)) ** 2 / squares if squares > 0.0 else 0.0


def thin_share(logged: LoggedDecisions, probabilities: Ragged, min_samples: int) -> float:
    """Return the mean probability that a policy gives to kinds with fewer than ``min_samples`` logged choices."""
    counts = Counter(kinds[n] for kinds, n in zip(logged.kinds, logged.chosen, strict=True))
    if all(counts[kind] >= min_samples for kind in set().union(*map(set, logged.kinds))):
        return 0.0
    thin = sum(
        float(p)
        for row, kinds in zip(probabilities, logged.kinds, strict=True)
        for p, kind in zip(row, kinds, strict=True)
        if counts[kind] < min_samples
    )
    return thin / len(logged)


def compare(
    logged: LoggedDecisions,
    targets: Sequence[TargetPolicy],
    settings: EvaluationSettings,
    predicted_rewards: Ragged | None = None,
    candidate: str | None = None,
) -> Comparison:
    """Estimate policies on the same decisions.

    Args:
        predicted_rewards: a model's reward of every choice. Fit it on other runs, or the intervals are too narrow.
        candidate: the policy that is compared with each of the others.
    """
    bootstrap = _Bootstrap(logged, settings)
    estimators = {t.name: _Estimators(logged, t, predicted_rewards, bootstrap) for t in targets}
    estimates = {t.name: _estimate(logged, t, estimators[t.name], bootstrap) for t in targets}
    differences = [
        _difference(estimators, estimates, (candidate, t.name), bootstrap)
        for t in targets
        if candidate is not None and t.name != candidate
    ]
    return Comparison(len(logged), bootstrap.num_runs, estimates, tuple(differences))


class _Bootstrap:
    """Sums over the runs of the log (row 0), and over draws of these runs (the other rows)."""

    def __init__(self, logged: LoggedDecisions, settings: EvaluationSettings) -> None:
        names, self._run = np.unique(np.array(logged.runs, dtype=str), return_inverse=True)
        self.num_runs, self.settings = len(names), settings
        rng = np.random.Generator(np.random.PCG64(settings.rng_seed))
        draws = np.zeros((0, 0), np.int64)
        if self.num_runs:
            draws = rng.multinomial(self.num_runs, np.full(self.num_runs, 1.0 / self.num_runs), settings.num_draws)
        self._times = np.vstack([np.ones(self.num_runs, np.int64), draws]).astype(np.float64)

    def sums(self, column: Floats) -> Floats:
        """Return the sums of a column, (1 + draws,)."""
        by_run = np.bincount(self._run, weights=column, minlength=self.num_runs).astype(np.float64)
        found: Floats = self._times @ by_run
        return found

    def interval(self, estimates: Floats) -> Interval:
        """Return the interval of estimates (1 + draws,); unknown if a draw has no finite estimate."""
        drawn, tail = estimates[1:], expanded_tail(self.settings.level, self.num_runs)
        if not len(drawn) or not np.all(np.isfinite(estimates)):
            return Interval(float(estimates[0]), float("nan"), float("nan"))
        low, high = np.quantile(drawn, (tail, 1.0 - tail))
        return Interval(float(estimates[0]), float(low), float(high))


class _Estimators:
    """SNIPS and DR of one policy, on the log and on every draw."""

    def __init__(
        self,
        logged: LoggedDecisions,
        target: TargetPolicy,
        predicted_rewards: Ragged | None,
        bootstrap: _Bootstrap,
    ) -> None:
        self.weights = weights_of(logged, target)
        self.snips = _ratio(bootstrap.sums(self.weights * logged.rewards), bootstrap.sums(self.weights))
        self.dr: Floats | None = None
        if predicted_rewards is not None and target.probabilities is not None:
            inverse = logged.inverse_measured
            pairs = zip(target.probabilities, predicted_rewards, strict=True)
            expected = np.array([p @ q for p, q in pairs], np.float64)
            rows = expected * inverse + self.weights * (logged.rewards - logged.of_chosen(predicted_rewards))
            self.dr = _ratio(bootstrap.sums(rows), bootstrap.sums(inverse))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    found: Floats = np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0.0)
    return found


def _estimate(
    logged: LoggedDecisions, target: TargetPolicy, estimators: _Estimators, bootstrap: _Bootstrap
) -> PolicyEstimate:
    settings, ess, thin = bootstrap.settings, effective_sample_size(estimators.weights), 0.0
    if target.probabilities is not None and len(logged):
        thin = thin_share(logged, target.probabilities, settings.min_samples)
    refusals = []
    if bootstrap.num_runs < settings.min_runs:
        refusals.append(f"{bootstrap.num_runs} runs, {settings.min_runs} are needed")
    if ess < settings.min_ess:
        refusals.append(f"effective sample size {ess:.1f}, {settings.min_ess:g} are needed")
    if thin > settings.max_thin_share:
        refusals.append(
            f"{100 * thin:.0f} % of its choices are of kinds with fewer than {settings.min_samples} samples, "
            f"{100 * settings.max_thin_share:g} % are allowed"
        )
    return PolicyEstimate(
        target.name,
        bootstrap.interval(estimators.snips),
        None if estimators.dr is None else bootstrap.interval(estimators.dr),
        ess,
        float(np.max(estimators.weights, initial=0.0)),
        thin,
        tuple(refusals),
    )


def _difference(
    estimators: Mapping[str, _Estimators],
    estimates: Mapping[str, PolicyEstimate],
    names: tuple[str, str],
    bootstrap: _Bootstrap,
) -> Difference:
    mine, other = (estimators[name] for name in names)
    dr = None if mine.dr is None or other.dr is None else bootstrap.interval(mine.dr - other.dr)
    is_supported = all(estimates[name].is_supported for name in names)
    return Difference(*names, bootstrap.interval(mine.snips - other.snips), dr, is_supported)


def expanded_tail(level: float, num_runs: int) -> float:
    """Return the share of draws to leave out at each end: with few runs a plain percentile interval is too narrow.

    P(Z < -sqrt(n / (n - 1)) t), with t the quantile of Student's t with n - 1 degrees of freedom (Hesterberg 2015,
    What teachers should know about the bootstrap).
    """
    if num_runs < 2:
        return 0.0
    from scipy import stats  # imported here: it takes a second or more, and most commands do not need it

    t = stats.t.ppf(0.5 + level / 2.0, num_runs - 1)
    return float(stats.norm.cdf(-t * math.sqrt(num_runs / (num_runs - 1))))
