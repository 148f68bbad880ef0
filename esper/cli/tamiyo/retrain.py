"""`esper tamiyo retrain`: fits a policy to the log and evaluates it on held-out runs."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from esper.cli.database import database_connection
from esper.cli.streams.replay_progress import QUIET, replay_progress
from esper.cli.tamiyo.evaluate import SEED, evaluate_policies, measure_outcomes
from esper.cli.tamiyo.replay import RUNS, SINCE, UNTIL, check_new_folder, replay_into, tamiyo_settings
from esper.cli.tamiyo.tables import print_split
from esper.cli.terminal import print_line
from esper.config import load_settings
from esper.errors import ConfigError
from esper.services.tamiyo.dataset.dataset_origin import read_origin
from esper.services.tamiyo.dataset.experience_files import read_experiences
from esper.services.tamiyo.dataset.log_ranges import EARLIEST, ReplayRange
from esper.services.tamiyo.evaluation.outcome_prediction import OutcomeAccuracy, best_threshold, predict_outcomes
from esper.services.tamiyo.evaluation.policy_evaluation import RewardModel, baselines
from esper.services.tamiyo.policies import Policy
from esper.services.tamiyo.policies.policy_sources import BASELINES, sources_by_kind
from esper.services.tamiyo.versions.retraining import (
    CANDIDATE,
    FitProgress,
    FitSettings,
    Split,
    find_fit,
    split_by_pattern,
    split_by_run,
    training_card,
    training_ranges,
)
from esper.streams.read_models.policy_versions import active_policy
from esper.streams.replay import ReplayProgress


def retrain(
    into: Path = typer.Option(..., help="New folder to write the policy and its card into."),
    experiences: Path | None = typer.Option(
        None, help="Folder from `esper tamiyo replay --into` to train on. [default: read the log]"
    ),
    since: list[str] = SINCE,
    until: list[str] = UNTIL,
    runs: list[str] = RUNS,
    held_out: float = typer.Option(0.2, min=0.0, max=1.0, help="Share of the runs to hold out."),
    held_out_runs: list[str] = typer.Option(
        [], help="Hold out the runs whose id matches this pattern instead. Repeatable."
    ),
    seed: int = SEED,
    resume: Path | None = typer.Option(None, help="Folder for the training state; resume from it if it has one."),
    tensorboard: Path | None = typer.Option(None, help="Folder for TensorBoard logs."),
    verify: bool = typer.Option(
        False, "--verify", help="First compute every view again; train on nothing if one differs."
    ),
    active: bool | None = typer.Option(
        None, "--active/--no-active", help="Also evaluate the active policy. [default: only when reading the log]"
    ),
    quiet: bool = QUIET,
) -> None:
    """Fit a policy to the log and evaluate it on held-out runs. It decides nothing until it is activated.

    The experiences that are read from the log are kept in the folder INTO.experiences; --resume reuses them.
    """
    check_new_folder(into)
    fit, reads_log = find_fit(), experiences is None
    if not reads_log and (list(since) != [EARLIEST] or until or runs or verify):
        raise ConfigError(
            "--experiences is a folder; leave out --from, --until, --runs and --verify, which read the log"
        )
    into.mkdir(parents=True, exist_ok=True)
    active_policies = asyncio.run(_load_active()) if (reads_log if active is None else active) else {}
    folder = experiences or into.with_name(f"{into.name}.experiences")
    if reads_log:
        log_range = ReplayRange.parse(since, until, runs)
        replay_into(folder, log_range, verify=verify, quiet=quiet, is_resumed=resume is not None)
    dataset, origin = read_experiences(folder), read_origin(folder)
    split = split_by_pattern(dataset, held_out_runs) if held_out_runs else split_by_run(dataset, held_out, seed)
    print_split(split)
    with replay_progress(quiet=quiet) as on_progress:
        trained = fit(
            split.train, FitSettings(seed, resume, tensorboard), lambda progress: on_progress(_as_replay(progress))
        )
    policies = {**baselines(tamiyo_settings()), **active_policies, CANDIDATE: trained.policy}
    comparison = evaluate_policies(
        split.held_out, policies, CANDIDATE, origin.measured, seed, trained.predict_rewards, quiet=quiet
    )
    accuracies = _measure_held_out(split, origin.placebos, trained.predict_rewards)
    ranges = training_ranges(origin.bounds.begins, origin.bounds.ends)
    trained.save(into, training_card(split, comparison, seed, ranges, accuracies))
    print_line(f"written to {into}")


def _measure_held_out(
    split: Split, placebos: Sequence[tuple[str, float]], reward_model: RewardModel
) -> Mapping[str, OutcomeAccuracy]:
    """Accuracy on the held-out runs, with floor and threshold from the training runs alone."""
    training_runs = set(split.train.runs)
    predicted = predict_outcomes(split.train, reward_model)
    return measure_outcomes(
        split.held_out,
        [difference for run_id, difference in placebos if run_id in training_runs],
        lambda floor: best_threshold(predicted.expected, predicted.reward > floor),
        reward_model,
    )


async def _load_active() -> dict[str, Policy]:
    """The active policy by its name and version; empty if none is active, or a baseline is."""
    async with database_connection() as connection:
        active = await active_policy(connection)
    if active is None or active.version.kind in BASELINES:
        return {}
    source = sources_by_kind(load_settings(), tamiyo_settings())[active.version.kind]
    return {str(active.version): await source.load(active.version)}


def _as_replay(progress: FitProgress) -> ReplayProgress:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in progress.numbers.items())
    return ReplayProgress(f"training: {numbers}", progress.num_batches, progress.num_expected)
