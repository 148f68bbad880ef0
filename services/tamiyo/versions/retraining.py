"""Retraining: splits experiences by run, fits a policy to one side and evaluates it on the other.

Owns the split, the interface of a fit and the card; ``esper.services.tamiyo.gnn`` owns the network and its training.
Invariant: the side of a run depends on the run alone, so held-out runs stay held out while the log grows.
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
"""The function that fits a policy, as MODULE:NAME; torch is imported with it."""

CANDIDATE = "candidate"
"""The name of a policy that was just fitted, in comparisons."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Settings of one fit; the `tamiyo.training` section has the hyperparameters.

    Attributes:
        rng_seed: equal seeds, experiences and machines give equal policies.
        resume_from: the folder that keeps the state of an interrupted fit, to resume from.
        curves_to: a folder for TensorBoard.
    """

    rng_seed: int = 0
    resume_from: Path | None = None
    curves_to: Path | None = None


@dataclass(frozen=True, slots=True)
class FitProgress:
    """Batches done, their maximum, and figures by name (the loss, for example)."""

    num_batches: int
    num_expected: int
    numbers: Mapping[str, float]


class FitResult(Protocol):
    """A fitted policy."""

    policy: Policy

    def predict_rewards(
        self, views: Sequence[GraphView], choices_per_view: Sequence[Sequence[Choice]], /
    ) -> Sequence[Sequence[float]]:
        """Return the expected reward of each choice of each view, in units of the metric."""
        ...

    def save(self, folder: Path, card: Mapping[str, Any]) -> None:
        """Write the policy (safetensors) and its card (JSON) into an existing, empty folder."""
        ...


class FitFunction(Protocol):
    """Fits a policy. Deterministic by seed on one machine."""

    def __call__(
        self, train: Experiences, settings: FitSettings, on_progress: Callable[[FitProgress], None]
    ) -> FitResult:
        """Learn from ``train`` alone; the runs for early stopping are part of it."""
        ...


class Split(NamedTuple):
    """Two sides without a run in common."""

    train: Experiences
    held_out: Experiences


def find_fit() -> FitFunction:
    """Import the function that fits a policy.

    Raises:
        ConfigError: this installation has none, or lacks a package that it needs.
    """
    module, _colon, name = FIT.partition(":")
    try:
        return cast("FitFunction", getattr(importlib.import_module(module), name))
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            raise ConfigError(
                f"nothing to train: this installation has no {module}; `esper tamiyo evaluate` compares what it has"
            ) from None
        raise ConfigError(f"{module} needs {error.name}: install it, then retrain") from error


def split_by_run(experiences: Experiences, held_out_share: float, rng_seed: int) -> Split:
    """Hold out approximately a share of the runs: those whose hash of seed and id, as a fraction, is below it.

    Raises:
        ConfigError: a side has no experiences.
    """
    held_out = {run_id for run_id in experiences.runs if _hash_fraction(run_id, rng_seed) < held_out_share}
    return _split(experiences, held_out, f"a seed of {rng_seed}", "--held-out or --seed")


def split_by_pattern(experiences: Experiences, patterns: Sequence[str]) -> Split:
    """Hold out the runs whose id matches a pattern (``*``, ``?``, ``[...]``).

    Raises:
        ConfigError: a side has no experiences.
    """
    held_out = {run_id for run_id in experiences.runs if any(fnmatchcase(run_id, p) for p in patterns)}
    return _split(experiences, held_out, " ".join(patterns), "--held-out-runs")


def _split(experiences: Experiences, held_out: Set[str], criterion: str, options: str) -> Split:
    split = Split(experiences.of_runs(set(experiences.runs) - held_out), experiences.of_runs(held_out))
    if not split.train or not split.held_out:
        raise ConfigError(
            f"{len(experiences.runs)} runs with {criterion} leave {len(split.train.runs)} to train on and "
            f"{len(split.held_out.runs)} held out: replay more runs, or change {options}"
        )
    return split


def training_card(
    split: Split,
    comparison: Comparison,
    rng_seed: int,
    data: Sequence[Mapping[str, Any]],
    accuracies: Mapping[str, OutcomeAccuracy] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what a policy's card records of its training and evaluation. Plain JSON.

    Args:
        data: the part of the log that it was trained on (``training_ranges``).
        accuracies: how well it predicts outcomes on the held-out runs, by name in the card.
    """
    level, runs = EvaluationSettings().level, split.held_out.runs
    sides = {
        name: {"digest": side.digest, "runs": list(side.runs), "num_experiences": len(side)}
        for name, side in split._asdict().items()
    }
    return {
        **sides,
        "seed": rng_seed,
        "data": list(data),
        "evaluation": comparison.to_dict(),
        "verdicts": [{"than": d.than, **verdict_of(comparison, d, runs, level)} for d in comparison.differences],
        "outcomes": None,
        **{name: asdict(accuracy) for name, accuracy in accuracies.items()},
    }


def training_ranges(begins: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]) -> list[dict[str, Any]]:
    """Return the offsets of the decisions that were trained on, by partition, for the card."""
    topic = DECISIONS.name
    return [
        {"topic": topic, "partition": n, "from_offset": first, "until_offset": max(first, ends.get((topic, n), first))}
        for (name, n), first in sorted(begins.items())
        if name == topic
    ]


def _hash_fraction(run_id: str, rng_seed: int) -> float:
    digest = hashlib.sha256(f"{rng_seed}:{run_id}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big")) / 2.0**64
