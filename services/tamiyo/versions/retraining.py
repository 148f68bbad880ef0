"""Retraining: experiences are split by run, a policy is fitted to one side and judged on the other.

Owns the split and the seam; the network and how it is fitted are ``esper.services.tamiyo.gnn``'s. Invariant: a run is
always on the same side, whatever other runs there are, so that what is held out stays held out as the log grows.
"""

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

from esper.errors import ConfigError
from esper.graph.graph_view import GraphView
from esper.oona.records import TopicPartition
from esper.schemas.topics import DECISIONS
from esper.services.tamiyo.control.legal_choices import Choice
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.evaluation.off_policy import Comparison, EvaluationSettings
from esper.services.tamiyo.evaluation.outcome_prediction import OutcomeAccuracy
from esper.services.tamiyo.evaluation.policy_evaluation import verdict_of
from esper.services.tamiyo.policies import Policy

FIT = "esper.services.tamiyo.gnn.policy_fit:fit"
"""Where the function is that fits a policy."""

CANDIDATE = "candidate"
"""What a policy that was just fitted is called among those it is compared with."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What one fit is told; how it learns is its own section of the settings.

    Attributes:
        rng_seed: where its chance starts: the same seed, experiences and machine give the same policy.
        resume_from: a folder in which an interrupted fit kept its state, to go on with; it is kept there too.
        curves_to: a folder for TensorBoard.
    """

    rng_seed: int = 0
    resume_from: Path | None = None
    curves_to: Path | None = None


@dataclass(frozen=True, slots=True)
class FitProgress:
    """How far a fit is: batches done, of how many at most, and numbers by name (the loss, say)."""

    num_batches: int
    num_expected: int
    numbers: Mapping[str, float]


class FitResult(Protocol):
    """What a fit gives."""

    policy: Policy

    def predict_rewards(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[Sequence[float]]:
        """Of each view the reward that it expects of each choice, in units of the metric."""
        ...

    def save(self, folder: Path, card: Mapping[str, Any]) -> None:
        """Write the policy and its card: safetensors and JSON, into a folder that is there and empty."""
        ...


class FitFunction(Protocol):
    """Fits a policy. Deterministic by seed on one machine."""

    def __call__(self, train: Experiences, settings: FitSettings, progress: Callable[[FitProgress], None]) -> FitResult:
        """Learn from ``train`` alone; what it needs to stop early it splits off itself."""
        ...


class Split(NamedTuple):
    """Two sides without a run in common."""

    train: Experiences
    held_out: Experiences


def find_fit() -> FitFunction:
    """The function that fits a policy.

    Raises:
        ConfigError: this installation has none.
    """
    module, _colon, name = FIT.partition(":")
    try:
        return cast("FitFunction", getattr(importlib.import_module(module), name))
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            raise ConfigError(
                f"nothing to train: this installation has no {module}; `esper tamiyo evaluate` judges what it has"
            ) from None
        raise ConfigError(f"{module} needs {error.name}: install it, then retrain") from error


def split_by_run(experiences: Experiences, held_out_share: float, rng_seed: int) -> Split:
    """Hold out about so large a share of the runs.

    A run is held out if the SHA-256 of seed and run id, as a fraction, is below the share.

    Raises:
        ConfigError: nothing is left on one of the sides.
    """
    held = {run_id for run_id in experiences.runs if _fraction(run_id, rng_seed) < held_out_share}
    return _split(experiences, held, f"a seed of {rng_seed}", "--held-out or --seed")


def split_by_pattern(experiences: Experiences, patterns: Sequence[str]) -> Split:
    """Hold out the runs whose id fits one of the patterns (``*``, ``?``, ``[...]``).

    Raises:
        ConfigError: nothing is left on one of the sides.
    """
    held = {run_id for run_id in experiences.runs if any(fnmatchcase(run_id, p) for p in patterns)}
    return _split(experiences, held, " ".join(patterns), "--held-out-runs")


def _split(experiences: Experiences, held: Set[str], of_what: str, options: str) -> Split:
    split = Split(experiences.of_runs(set(experiences.runs) - held), experiences.of_runs(held))
    if not split.train or not split.held_out:
        raise ConfigError(
            f"{len(experiences.runs)} runs with {of_what} leave {len(split.train.runs)} to train on and "
            f"{len(split.held_out.runs)} held out: replay more runs, or change {options}"
        )
    return split


def training_card(
    split: Split,
    judged: Comparison,
    rng_seed: int,
    data: Sequence[Mapping[str, Any]],
    foreseen: Mapping[str, OutcomeAccuracy] = MappingProxyType({}),
) -> dict[str, Any]:
    """What goes on the card of a policy: what it was fitted to, what it was judged on, and the verdict. Plain JSON.

    Args:
        data: the part of the log that it learnt from (``training_ranges``).
        foreseen: how well it foresees outcomes on the runs that were held out, by what they are called in the card.
    """
    level, runs = EvaluationSettings().level, split.held_out.runs
    verdicts = [{"than": one.than, **verdict_of(judged, one, runs, level)} for one in judged.differences]
    sides = {
        name: {"digest": side.digest, "runs": list(side.runs), "num_experiences": len(side)}
        for name, side in split._asdict().items()
    }
    told = {"evaluation": judged.to_dict(), "verdicts": verdicts, "outcomes": None}
    outcomes = {name: asdict(found) for name, found in foreseen.items()}
    return {**sides, "seed": rng_seed, "data": list(data), **told, **outcomes}


def training_ranges(begins: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]) -> list[dict[str, Any]]:
    """Which decisions were learnt from, for a card: by partition, from and until an offset."""
    topic = DECISIONS.name
    return [
        {"topic": topic, "partition": n, "from_offset": first, "until_offset": max(first, ends.get((topic, n), first))}
        for (name, n), first in sorted(begins.items())
        if name == topic
    ]


def _fraction(run_id: str, rng_seed: int) -> float:
    digest = hashlib.sha256(f"{rng_seed}:{run_id}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big")) / 2.0**64
