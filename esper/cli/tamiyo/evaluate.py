"""`esper tamiyo evaluate`: judges policies on recorded experiences (off-policy evaluation)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from esper.cli.streams.replay_progress import QUIET, replay_progress
from esper.cli.tamiyo.replay import tamiyo_settings
from esper.cli.tamiyo.tables import print_evaluation, print_outcome_accuracy
from esper.cli.terminal import print_line
from esper.errors import ConfigError
from esper.services.tamiyo.dataset.dataset_origin import read_origin
from esper.services.tamiyo.dataset.experience_files import read_experiences
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.evaluation.off_policy import Comparison, EvaluationSettings
from esper.services.tamiyo.evaluation.outcome_prediction import (
    OutcomeAccuracy,
    outcome_accuracy,
    predict_outcomes,
    repeated_draws,
)
from esper.services.tamiyo.evaluation.policy_evaluation import Measured, RewardModel, baselines
from esper.services.tamiyo.evaluation.policy_evaluation import evaluate as run_evaluation
from esper.services.tamiyo.evaluation.reward import MIN_DIFFERENCES, noise_floor
from esper.services.tamiyo.policies import Policy
from esper.services.tamiyo.versions.retraining import split_by_run
from esper.streams.replay import ReplayProgress

if TYPE_CHECKING:
    from esper.services.tamiyo.gnn.gnn_policy import GnnPolicy

FITTED = "fitted"
SEED = typer.Option(0, help="Random seed; also selects the held-out runs.")


def evaluate(
    folder: Path = typer.Argument(..., help="Folder with experiences, from `esper tamiyo replay --into`."),
    candidate: str | None = typer.Option(
        None, help="Policy to compare with each of the others. [default: fitted if --fitted is given, else heuristic]"
    ),
    fitted: Path | None = typer.Option(
        None, help="Folder from `esper tamiyo retrain --into`: also evaluate this policy, by the name `fitted`."
    ),
    held_out: float = typer.Option(1.0, min=0.0, max=1.0, help="Share of the runs to evaluate on."),
    seed: int = SEED,
    quiet: bool = QUIET,
) -> None:
    """Estimate from recorded experiences how well policies would have done.

    A fitted policy must not have been trained on these experiences. A policy cannot be evaluated if the log
    has too few of the decisions that it would make.
    """
    policies, origin = baselines(tamiyo_settings()), read_origin(folder)
    loaded = None if fitted is None else _load_fitted(fitted)
    if loaded is not None:
        policies[FITTED] = loaded[0]
    candidate = candidate or ("heuristic" if loaded is None else FITTED)
    if candidate not in policies:
        raise ConfigError(f"--candidate {candidate}: no such policy; choose one of {', '.join(policies)}")
    experiences = read_experiences(folder)
    if held_out < 1.0:
        experiences = split_by_run(experiences, held_out, seed).held_out
    reward_model = None if loaded is None else loaded[0].predict_rewards
    evaluate_policies(experiences, policies, candidate, origin.measured, seed, reward_model, quiet=quiet)
    if loaded is not None and reward_model is not None:
        threshold, runs = loaded[1], set(experiences.runs)
        placebos = [difference for run_id, difference in origin.placebos if run_id in runs]
        measure_outcomes(experiences, placebos, lambda _floor: threshold, reward_model)


def evaluate_policies(
    held_out: Experiences,
    policies: dict[str, Policy],
    candidate: str,
    measured: Measured,
    seed: int,
    reward_model: RewardModel | None,
    *,
    quiet: bool,
) -> Comparison:
    """Evaluate policies and print the result."""
    with replay_progress(quiet=quiet) as on_progress:
        comparison = run_evaluation(
            held_out,
            policies,
            epsilon=tamiyo_settings().epsilon,
            measured=measured,
            settings=EvaluationSettings(rng_seed=seed),
            candidate=candidate,
            reward_model=reward_model,
            on_progress=lambda n: on_progress(ReplayProgress("evaluating", n, len(held_out))),
        )
    print_evaluation(comparison)
    return comparison


def measure_outcomes(
    held_out: Experiences,
    placebos: Sequence[float],
    threshold: Callable[[float], float],
    reward_model: RewardModel,
) -> Mapping[str, OutcomeAccuracy]:
    """Measure and print how often outcomes are predicted correctly, for each noise floor that is known.

    Args:
        placebos: differences that forks with a `noop` kernel show; they give the noise floor.
        threshold: for a floor, the predicted reward above which a germination counts as predicted to help.

    Returns:
        The accuracies by their names in the policy's card.
    """
    floors = dict[str, tuple[str, Experiences, float]]()
    if len(placebos) < MIN_DIFFERENCES:
        print_line(f"accuracy of predicted outcomes not measured: {len(placebos)} of {MIN_DIFFERENCES} placebos")
    else:
        floors["outcomes"] = ("placebo floor", held_out, noise_floor(placebos).high)
    if drawn := repeated_draws(held_out):
        floors["outcomes_beyond_pairs"] = ("floor of paired branches", *drawn)
    accuracies = dict[str, OutcomeAccuracy]()
    for name, (floor_name, experiences, floor) in floors.items():
        if accuracy := outcome_accuracy(threshold(floor), predict_outcomes(experiences, reward_model), floor):
            accuracies[name] = accuracy
            print_outcome_accuracy(accuracy, floor_name)
    return accuracies


def _load_fitted(folder: Path) -> tuple["GnnPolicy", float]:
    """A fitted policy, and the predicted reward above which it expects a germination to help."""
    from esper.services.tamiyo.gnn.policy_file import load_policy
    from esper.services.tamiyo.versions.publication import read_fitted

    found = read_fitted(folder)
    threshold = (found.card.get("outcomes") or {}).get("threshold")
    return load_policy(found.data, found.sha256), math.inf if threshold is None else float(threshold)
