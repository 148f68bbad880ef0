"""`esper tamiyo corpus`: trains many small networks, from whose runs a policy learns.

The runs go to the log; `esper tamiyo replay` and `retrain` make experiences of them.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from esper.cli.terminal import new_table, print_line, print_table
from esper.config import Settings, load_settings
from esper.logging import configure_logging

if TYPE_CHECKING:
    from esper.services.tolaria.corpus.training_corpus import TrainedRun

RANDOM_TAMIYO: Mapping[str, str] = {
    "ESPER_TAMIYO__POLICY": "random",
    "ESPER_TAMIYO__RANDOM_WAIT_PROBABILITY": "0.7",
}
"""Settings of the Tamiyo that makes a corpus. Its random decisions let the log support the evaluation of any policy."""


def corpus(
    runs: int = typer.Option(20, min=1, help="Number of runs."),
    seed: int = typer.Option(0, min=0, help="Random seed of the plans; part of the run ids."),
    first: int = typer.Option(0, min=0, help="Number of the first plan: continue where an earlier corpus ended."),
    minutes: float | None = typer.Option(None, min=0.0, help="Start no run after this many minutes."),
    processes: int = typer.Option(4, min=1, help="Number of runs that train at the same time."),
    min_boundary_interval: float = typer.Option(
        0.3, min=0.0, help="Minimum seconds between two boundaries of a run, so that Tamiyo keeps up."
    ),
    forks: float = typer.Option(1.0, min=0.0, max=1.0, help="Share of germinations that are forked."),
    draws: int = typer.Option(
        1, min=1, max=32, help="Batch orders that each fork is measured on; with 2 or more its noise is known."
    ),
    cifar: Path | None = typer.Option(
        None, help="Folder with CIFAR-10 (cifar10-train.parquet). [default: train on digits only]"
    ),
    folder: Path = typer.Option(Path("runs"), help="Folder for the local state of the runs."),
    services: bool = typer.Option(
        False, "--services", help="Start a worker, Urza and a random Tamiyo, and stop them at the end."
    ),
) -> None:
    """Train many small networks of different kinds: the runs that a policy learns from.

    Takes minutes to hours, and needs a running stack (`esper up`). Afterwards `esper tamiyo retrain` trains the policy.
    """
    from esper.services.tolaria.corpus.training_corpus import CorpusSettings, find_cifar, train_corpus

    settings = load_settings()
    configure_logging(settings.logging.model_copy(update={"level": "WARNING"}))
    cifar_folder, reason = find_cifar(cifar)
    if cifar_folder is None:
        print_line(f"digits only: {escape(reason)}")
    common = CorpusSettings(seed, folder.resolve(), min_boundary_interval, forks, draws, cifar_folder)
    with ExitStack() as exits:
        if services:
            exits.enter_context(running_services(folder.resolve(), RANDOM_TAMIYO))
        began = time.monotonic()
        trained = train_corpus(
            common,
            errors_only(settings),
            num_runs=runs,
            first=first,
            num_processes=processes,
            deadline_s=None if minutes is None else 60 * minutes,
            report=_print_run,
        )
        duration_s = time.monotonic() - began
        _print_summary(trained, asyncio.run(_count_events(settings, [t.plan.run_id for t in trained])), duration_s)


def running_services(folder: Path, tamiyo: Mapping[str, str]) -> Any:
    """A context manager that runs a worker, Urza and a Tamiyo whose commands expire after two boundaries.

    Args:
        folder: gets the services' logs.
        tamiyo: environment variables with Tamiyo's settings.
    """
    from esper.services.tolaria.orchestrator import Orchestrator, standard_services

    logs = folder / "corpus-logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**tamiyo, "ESPER_TAMIYO__EXPIRY_BOUNDARIES": "2"}
    return Orchestrator(standard_services(), environment, logs, report=lambda line: print_line(f"  {line}"))


def errors_only(settings: Settings) -> Settings:
    """The settings, changed so that only errors are logged."""
    return settings.model_copy(update={"logging": settings.logging.model_copy(update={"level": "ERROR"})})


def _print_run(run: "TrainedRun") -> None:
    plan, results = run.plan.trainer, run.results
    outcome = (
        f"accuracy {results.initial_accuracy:.3f} -> {results.final_accuracy:.3f}, {results.adaptations_applied} grown"
        if results
        else f"failed: {run.error}"
    )
    what = f"{plan.dataset} {plan.network}  {plan.epochs} epochs"
    print_line(escape(f"{run.plan.run_id}  {what}  {outcome}  {run.duration_s:.1f} s"))


async def _count_events(settings: Settings, run_ids: Sequence[str]) -> Counter[str]:
    """Decisions, forks and rejected commands of these runs in the log, by kind."""
    from esper.oona.log_reader import read_range
    from esper.schemas.events import CommandRejected, DecisionMade, FieldReported
    from esper.schemas.topics import DECISIONS, FIELD_REPORTS, LIFECYCLE

    counts: Counter[str] = Counter()
    keys, kafka = {name.encode() for name in run_ids}, settings.need_kafka()
    for topic in (DECISIONS, FIELD_REPORTS, LIFECYCLE):
        async for record in read_range(kafka, topic):
            if record.key not in keys:
                continue
            match record.decode().data:
                case DecisionMade() as decision:
                    counts["decisions"] += 1
                    counts["stale decisions"] += decision.stale
                    counts[f"decided: {decision.action}"] += 1
                case FieldReported(fork=fork) if fork is not None:
                    counts["placebos" if fork.is_placebo else "forks"] += 1
                case CommandRejected() as rejected:
                    counts[f"rejected: {rejected.reason}"] += 1
    return counts


def _print_summary(trained: Sequence["TrainedRun"], counts: Counter[str], duration_s: float) -> None:
    num_runs = max(1, len(trained))
    rows = [
        (name, str(count), f"{count / num_runs:.1f}", f"{60 * count / duration_s:.1f}")
        for name, count in [("runs", len(trained)), *sorted(counts.items())]
    ]
    print_table(new_table("event", numbers=("number", "per run", "per minute"), rows=rows))
    mean_s, cpu_s = sum(t.duration_s for t in trained) / num_runs, sum(t.cpu_s for t in trained) / num_runs
    print_line(f"mean duration of a run: {mean_s:.1f} s, {cpu_s:.1f} s of CPU time in its own process, forks included")
