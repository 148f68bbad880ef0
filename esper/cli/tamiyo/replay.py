"""`esper tamiyo replay`, `evaluate` and `retrain`: from the log to experiences, to a verdict, to a policy."""

import asyncio
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from esper.cli.streams.replay_progress import run_with_progress, shown
from esper.cli.tamiyo.tables import (
    show_comparison,
    show_digest,
    show_foresight,
    show_replay,
    show_split,
    show_verified,
)
from esper.config import Settings, load_settings
from esper.errors import ConfigError, ConflictError
from esper.services.tamiyo.dataset.dataset_origin import describe_origin, read_origin, was_read_with
from esper.services.tamiyo.dataset.exclusions import FAULTS
from esper.services.tamiyo.dataset.experience_files import read_experiences, write_experiences
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.dataset.log_ranges import EARLIEST, ReplayRange
from esper.services.tamiyo.dataset.log_replay import Replay
from esper.services.tamiyo.dataset.log_replay import replay as read_log
from esper.services.tamiyo.dataset.report_rewards import fork_rewards
from esper.services.tamiyo.dataset.view_verification import verify_views
from esper.services.tamiyo.evaluation.off_policy import Comparison, EvaluationSettings
from esper.services.tamiyo.evaluation.outcome_prediction import (
    OutcomeAccuracy,
    best_threshold,
    outcome_accuracy,
    predict_outcomes,
    repeated_draws,
)
from esper.services.tamiyo.evaluation.policy_evaluation import Measured, RewardModel, baselines, evaluate
from esper.services.tamiyo.evaluation.reward import MIN_DIFFERENCES, noise_floor
from esper.services.tamiyo.policies import Policy
from esper.services.tamiyo.policies.policy_sources import BASELINES, sources_by_kind
from esper.services.tamiyo.settings import RentSettings, TamiyoSettings
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
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.policy_versions import active_policy
from esper.streams.replay import ReplayProgress

if TYPE_CHECKING:
    from esper.services.tamiyo.gnn.gnn_policy import GnnPolicy

EXIT_DIFFERENT = 1
SHOWN = 10
FITTED = "fitted"

_FROM = typer.Option(
    [EARLIEST],
    "--from",
    help="The first decisions: EARLIEST, a time, or control.tamiyo.decisions[PARTITION]@OFFSET (may be given again).",
)
_UNTIL = typer.Option(
    [], help="See nothing of the log behind TOPIC[PARTITION]@OFFSET (may be given again), or behind a time."
)
_RUNS = typer.Option([], help="Runs whose id fits the pattern: *, ?, [abc] (may be given again).")
_QUIET = typer.Option(False, "--quiet", "-q", help="Show no progress.")
_SEED = typer.Option(0, help="Chooses the runs that are held out, and where chance starts.")


def register(group: typer.Typer) -> None:
    """Add the commands to the `esper tamiyo` group."""
    group.command()(replay)
    group.command("evaluate")(evaluate_policies)
    group.command()(retrain)


def replay(
    since: list[str] = _FROM,
    until: list[str] = _UNTIL,
    runs: list[str] = _RUNS,
    into: Path | None = typer.Option(None, help="Write the experiences into this new folder."),
    again: Path | None = typer.Option(
        None, help="Read the part of the log that this folder was made of, and compare digests."
    ),
    verify: bool = typer.Option(False, "--verify", help="Make every view again, from telemetry, and compare."),
    strict: bool = typer.Option(False, "--strict", help="Exit with 1 where the log is truncated or damaged."),
    show: int = typer.Option(SHOWN, min=0, help="Show so many of what was set aside."),
    quiet: bool = _QUIET,
) -> None:
    """Read experiences from the log: views, decisions and field reports, joined by causation.

    The same part of the log gives the same digest, always. Exit code 0: read. 1: with --verify a view differs, with
    --again the digest, with --strict the log is not whole. 2: it could not be done.
    """
    settings, console = load_settings(), Console()
    if again is not None and (list(since) != [EARLIEST] or until or runs):
        raise ConfigError("--again reads what its folder was made of: leave --from, --until and --runs away")
    asked = ReplayRange.parse(since, until, runs) if again is None else read_origin(again).asked
    _check_new(into)
    found = _read(settings, console, asked, again, quiet)
    show_replay(console, found, show)
    if into is not None:
        write_experiences(into, found.joined.experiences, describe_origin(found, asked, _rent(again)))
        console.print(f"written to {into}", highlight=False, soft_wrap=True)
    is_good = not (strict and (found.bounds.lost or any(one.reason in FAULTS for one in found.exclusions)))
    if again is not None:
        is_good &= _compare_digests(console, found.joined.experiences, again)
    if verify:
        is_good &= _verify(settings, console, found, quiet)
    if not is_good:
        raise typer.Exit(EXIT_DIFFERENT)


def evaluate_policies(
    folder: Path = typer.Argument(..., help="Experiences, from `esper tamiyo replay --into`."),
    candidate: str | None = typer.Option(
        None, help="The policy that is compared with each of the others; heuristic, or the fitted one, by default."
    ),
    fitted: Path | None = typer.Option(
        None, help="Also judge the policy that `esper tamiyo retrain --into` wrote here; its name is `fitted`."
    ),
    held_out: float = typer.Option(1.0, min=0.0, max=1.0, help="Share of the runs that is judged on."),
    seed: int = _SEED,
    quiet: bool = _QUIET,
) -> None:
    """Judge policies on experiences: how good they would have been. A fitted one must not have learnt from these.

    Of a policy of which the log says too little nothing is said but that.
    """
    policies, console, origin = baselines(_tamiyo()), Console(), read_origin(folder)
    learnt = None if fitted is None else _fitted(fitted)
    if learnt is not None:
        policies[FITTED] = learnt[0]
    candidate = candidate or ("heuristic" if learnt is None else FITTED)
    if candidate not in policies:
        raise ConfigError(f"--candidate {candidate}: there are {', '.join(policies)}")
    experiences = read_experiences(folder)
    if held_out < 1.0:
        experiences = split_by_run(experiences, held_out, seed).held_out
    predict_rewards = None if learnt is None else learnt[0].predict_rewards
    _judge(console, experiences, policies, candidate, origin.measured, seed, quiet, predict_rewards)
    if learnt is not None and predict_rewards is not None:
        threshold, runs = learnt[1], set(experiences.runs)
        placebos = [difference for run_id, difference in origin.placebos if run_id in runs]
        _foresee(console, experiences, placebos, lambda _floor: threshold, predict_rewards)


def retrain(
    into: Path = typer.Option(..., help="Write the policy and its card into this new folder."),
    experiences: Path | None = typer.Option(
        None, help="Train on this folder of `esper tamiyo replay`, not on the log."
    ),
    since: list[str] = _FROM,
    until: list[str] = _UNTIL,
    runs: list[str] = _RUNS,
    held_out: float = typer.Option(0.2, min=0.0, max=1.0, help="Share of the runs that is held out."),
    held_out_runs: list[str] = typer.Option(
        [], help="Hold out the runs whose id fits the pattern instead (may be given again)."
    ),
    seed: int = _SEED,
    resume: Path | None = typer.Option(None, help="Keep the state here, and go on from what is there."),
    tensorboard: Path | None = typer.Option(None, help="Write curves for TensorBoard into this folder."),
    verify: bool = typer.Option(
        False, "--verify", help="First make every view again; train on nothing if one differs."
    ),
    active: bool | None = typer.Option(
        None, "--active/--no-active", help="Also judge the learnt version that decides now; with the log by default."
    ),
    quiet: bool = _QUIET,
) -> None:
    """Fit a policy to the log, and judge it on runs that it never saw. It decides nothing until it is activated.

    What was read from the log stays beside it, in a folder of the same name with `.experiences`; with --resume it is
    not read again.
    """
    _check_new(into)
    console, fit, is_on_log = Console(), find_fit(), experiences is None
    if not is_on_log and (list(since) != [EARLIEST] or until or runs or verify):
        raise ConfigError(
            "--experiences is a folder: --from, --until, --runs and --verify belong to a replay of the log"
        )
    into.mkdir(parents=True, exist_ok=True)
    deciding = asyncio.run(_active()) if (is_on_log if active is None else active) else {}
    folder = experiences or into.with_name(f"{into.name}.experiences")
    if is_on_log:
        _replay_into(folder, console, ReplayRange.parse(since, until, runs), verify, quiet, is_resumed=resume is not None)
    read = read_experiences(folder)
    split = split_by_pattern(read, held_out_runs) if held_out_runs else split_by_run(read, held_out, seed)
    show_split(console, split)
    with shown(console, quiet=quiet) as tell:
        trained = fit(split.train, FitSettings(seed, resume, tensorboard), lambda told: tell(_as_told(told)))
    policies = {**baselines(_tamiyo()), **deciding, CANDIDATE: trained.policy}
    origin = read_origin(folder)
    judged = _judge(console, split.held_out, policies, CANDIDATE, origin.measured, seed, quiet, trained.predict_rewards)
    foreseen = _foresee_learnt(console, split, origin.placebos, trained.predict_rewards)
    trained.save(into, training_card(split, judged, seed, training_ranges(origin.bounds.begins, origin.bounds.ends), foreseen))
    console.print(f"written to {into}", highlight=False, markup=False, soft_wrap=True)


def _fitted(folder: Path) -> tuple["GnnPolicy", float]:
    """The policy that was fitted into a folder, and above which gain it says that something helps."""
    from esper.services.tamiyo.gnn.policy_file import load_policy
    from esper.services.tamiyo.versions.publication import read_fitted

    found = read_fitted(folder)
    threshold = (found.card.get("outcomes") or {}).get("threshold")
    return load_policy(found.data, found.sha256), math.inf if threshold is None else float(threshold)


def _replay_into(folder: Path, console: Console, asked: ReplayRange, verify: bool, quiet: bool, *, is_resumed: bool) -> None:
    """Read the log into a new folder; the one that is there is gone on with, if it is of the same part of the log."""
    if is_resumed and folder.exists():
        if not was_read_with(folder, asked):
            raise ConflictError(
                f"{folder} was read with another --from, --until or --runs: give the same ones, or remove it"
            )
        return
    _check_new(folder)
    settings = load_settings()
    found = _read(settings, console, asked, None, quiet)
    show_replay(console, found, SHOWN)
    if verify and not _verify(settings, console, found, quiet):
        console.print("[red]nothing was trained[/red]")
        raise typer.Exit(EXIT_DIFFERENT)
    write_experiences(folder, found.joined.experiences, describe_origin(found, asked, _rent(None)))


def _judge(
    console: Console,
    held_out: Experiences,
    policies: dict[str, Policy],
    candidate: str,
    measured: Measured,
    seed: int,
    quiet: bool,
    reward_model: RewardModel | None = None,
) -> Comparison:
    """Judge them and show what was found."""
    with shown(console, quiet=quiet) as tell:
        found = evaluate(
            held_out,
            policies,
            epsilon=_tamiyo().epsilon,
            measured=measured,
            evaluation_settings=EvaluationSettings(rng_seed=seed),
            candidate=candidate,
            reward_model=reward_model,
            tell=lambda n: tell(ReplayProgress("judging", n, len(held_out))),
        )
    show_comparison(console, found)
    return found


def _foresee_learnt(
    console: Console, split: Split, placebos: Sequence[tuple[str, float]], predict_rewards: RewardModel
) -> Mapping[str, OutcomeAccuracy]:
    """What the runs learnt from say of floor and threshold, the held-out ones are judged by."""
    runs = set(split.train.runs)
    learnt = predict_outcomes(split.train, predict_rewards)
    known = [difference for run_id, difference in placebos if run_id in runs]
    return _foresee(
        console, split.held_out, known, lambda floor: best_threshold(learnt.expected, learnt.reward > floor), predict_rewards
    )


def _foresee(
    console: Console,
    held_out: Experiences,
    placebos: Sequence[float],
    threshold: Callable[[float], float],
    predict_rewards: RewardModel,
) -> Mapping[str, OutcomeAccuracy]:
    """How well outcomes are foreseen, by its name in the card: beyond each floor that there is enough to know of.

    Args:
        threshold: for a floor, the expected gain above which something is said to help.
    """
    floors = dict[str, tuple[str, Experiences, float]]()
    if len(placebos) < MIN_DIFFERENCES:
        told = f"{len(placebos)} placebos, {MIN_DIFFERENCES} are needed to say what helped"
        console.print(told, highlight=False, soft_wrap=True)
    else:
        floors["outcomes"] = ("placebo floor", held_out, noise_floor(placebos).high)
    if drawn := repeated_draws(held_out):
        floors["outcomes_beyond_pairs"] = ("floor of paired branches", *drawn)
    found = dict[str, OutcomeAccuracy]()
    for name, (told, judged, floor) in floors.items():
        if one := outcome_accuracy(threshold(floor), predict_outcomes(judged, predict_rewards), floor):
            found[name] = one
            show_foresight(console, one, told)
    return found


async def _active() -> dict[str, Policy]:
    """The learnt version that decides now, by policy and version; nothing where a baseline does, or nobody."""
    settings = load_settings()
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        found = await active_policy(connection)
    if found is None or found.version.kind in BASELINES:
        return {}
    return {str(found.version): await sources_by_kind(settings, _tamiyo())[found.version.kind].load(found.version)}


def _as_told(told: FitProgress) -> ReplayProgress:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in told.numbers.items())
    return ReplayProgress(f"training: {numbers}", told.num_batches, told.num_expected)


def _tamiyo() -> TamiyoSettings:
    return load_settings().section("tamiyo", TamiyoSettings)


def _check_new(folder: Path | None) -> None:
    if folder is not None and folder.exists() and (not folder.is_dir() or os.listdir(folder)):
        raise ConflictError(f"{folder} is there already: name a new folder, or remove it")


def _rent(again: Path | None) -> RentSettings:
    """As the settings have it; that of a folder, where it is read again."""
    return _tamiyo().rent if again is None else RentSettings.model_validate(read_origin(again).rent)


def _read(settings: Settings, console: Console, asked: ReplayRange, again: Path | None, quiet: bool) -> Replay:
    kafka, rewarding, bounds = settings.need_kafka(), fork_rewards(_rent(again)), None
    if again is not None:
        bounds = read_origin(again).bounds
    with shown(console, quiet=quiet) as tell:
        return run_with_progress(lambda: read_log(kafka, asked, rewarding, bounds=bounds, tell=tell))


def _compare_digests(console: Console, found: Experiences, folder: Path) -> bool:
    before = read_experiences(folder)
    if before.digest == found.digest:
        console.print(f"equal to {folder}", highlight=False, soft_wrap=True)
        return True
    was, now = ({e.key: e.canonical() for e in some.stored} for some in (before, found))
    key = min(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
    what = "is gone" if key not in now else "is new" if key not in was else "differs"
    run, incarnation, boundary = key
    console.print(
        f"[red]not equal to {escape(str(folder))}: the first that {what} is {escape(run)} incarnation {incarnation} "
        f"boundary {boundary}[/red]",
        highlight=False,
        soft_wrap=True,
    )
    show_digest(console, before)
    return False


def _verify(settings: Settings, console: Console, found: Replay, quiet: bool) -> bool:
    views = found.joined.views
    with shown(console, quiet=quiet) as tell:
        verified = run_with_progress(lambda: verify_views(settings, views, tell))
    show_verified(console, verified, len(views))
    return not verified.different
