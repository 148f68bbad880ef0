"""`esper tamiyo ground`: many small runs through the real bus, for Tamiyo to learn from."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from esper.config import Settings, load_settings
from esper.logging import configure_logging

if TYPE_CHECKING:
    from esper.services.tolaria.corpus.training_corpus import TrainedRun

RANDOM_TAMIYO: Mapping[str, str] = {
    "ESPER_TAMIYO__POLICY": "random",
    "ESPER_TAMIYO__RANDOM_WAIT_SHARE": "0.7",
}
"""How Tamiyo decides for the ground: by chance, so that the log has support for any policy."""


def register(tamiyo: typer.Typer) -> None:
    """Add the command."""
    tamiyo.command()(ground)


def ground(
    runs: int = typer.Option(20, min=1, help="So many runs."),
    seed: int = typer.Option(0, min=0, help="Where the plans' chance starts; the runs are named after it."),
    first: int = typer.Option(0, min=0, help="The first plan's number: go on where an earlier ground ended."),
    minutes: float | None = typer.Option(None, min=0.0, help="Begin no run after so many minutes."),
    processes: int = typer.Option(4, min=1, help="Runs at once."),
    pace: float = typer.Option(
        0.3, min=0.0, help="Least seconds between two boundaries of a run: Tamiyo must keep up."
    ),
    forks: float = typer.Option(1.0, min=0.0, max=1.0, help="Share of germinations that are forked."),
    draws: int = typer.Option(
        1, min=1, max=32, help="Batch orders that a fork is measured on: from 2 on its noise is known."
    ),
    cifar: Path | None = typer.Option(
        None, help="Folder with CIFAR-10 (cifar10-train.parquet); without it digits only."
    ),
    folder: Path = typer.Option(Path("runs"), help="Where the runs keep their local state."),
    services: bool = typer.Option(
        False, "--services", help="Start worker, Urza and a random Tamiyo for the time of it."
    ),
) -> None:
    """Train many small runs, all different, that Tamiyo learns from; needs a running stack (`esper up`)."""
    from esper.services.tolaria.corpus.training_corpus import CorpusSettings, find_cifar, train_corpus

    settings, console = load_settings(), Console()
    configure_logging(settings.logging.model_copy(update={"level": "WARNING"}))
    found, reason = find_cifar(cifar)
    if found is None:
        console.print(f"digits only: {reason}", highlight=False, markup=False)
    common = CorpusSettings(seed, folder.resolve(), pace, forks, draws, found)
    with ExitStack() as exits:
        if services:
            exits.enter_context(services_of(folder.resolve(), console, RANDOM_TAMIYO))
        began = time.monotonic()
        trained = train_corpus(
            common,
            settings.model_copy(update={"logging": settings.logging.model_copy(update={"level": "ERROR"})}),
            num_runs=runs,
            first=first,
            num_processes=processes,
            deadline_s=None if minutes is None else 60 * minutes,
            report=lambda one: _show(console, one),
        )
        took_s = time.monotonic() - began
        _summarize(console, trained, asyncio.run(_told(settings, [t.plan.run_id for t in trained])), took_s)


def services_of(folder: Path, console: Console, tamiyo: Mapping[str, str]) -> Any:
    """A context: the services of a stack, Tamiyo told what these variables say; commands soon expire."""
    from esper.services.tolaria.orchestrator import Orchestrator, standard_services

    logs = folder / "ground-logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**tamiyo, "ESPER_TAMIYO__EXPIRY_BOUNDARIES": "2"}
    return Orchestrator(standard_services(), environment, logs, report=lambda line: console.print(f"  {line}"))


def _show(console: Console, one: "TrainedRun") -> None:
    plan, results = one.plan.trainer, one.results
    said = (
        f"accuracy {results.initial_accuracy:.3f} -> {results.final_accuracy:.3f}, {results.adaptations_applied} grown"
        if results
        else f"failed: {one.problem}"
    )
    console.print(
        f"{one.plan.run_id}  {plan.dataset} {plan.network}  {plan.epochs} epochs  {said}  {one.duration_s:.1f} s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


async def _told(settings: Settings, run_ids: Sequence[str]) -> Counter[str]:
    """What the log holds of these runs: decisions and forks by kind, commands refused."""
    from esper.oona.log_reader import read_range
    from esper.schemas.events import CommandRejected, DecisionMade, FieldReported
    from esper.schemas.topics import DECISIONS, FIELD_REPORTS, LIFECYCLE

    counts: Counter[str] = Counter()
    wanted, kafka = {name.encode() for name in run_ids}, settings.need_kafka()
    for topic in (DECISIONS, FIELD_REPORTS, LIFECYCLE):
        for partition in range(topic.num_partitions):
            async for record in read_range(kafka, topic, partition=partition):
                if record.key not in wanted:
                    continue
                match record.decode().data:
                    case DecisionMade() as decision:
                        counts["decisions"] += 1
                        counts["stale decisions"] += decision.stale
                        counts[f"decided: {decision.action}"] += 1
                    case FieldReported(fork=fork) if fork is not None:
                        counts["placebos" if fork.is_placebo else "forks"] += 1
                    case CommandRejected() as refused:
                        counts[f"refused: {refused.reason}"] += 1
    return counts


def _summarize(console: Console, trained: Sequence["TrainedRun"], counts: Counter[str], took_s: float) -> None:
    table = Table("of all runs", "number", "per run", "per minute")
    for name, count in [("runs", len(trained)), *sorted(counts.items())]:
        table.add_row(name, str(count), f"{count / max(1, len(trained)):.1f}", f"{60 * count / took_s:.1f}")
    console.print(table)
    num_runs = max(1, len(trained))
    each, busy = sum(t.duration_s for t in trained) / num_runs, sum(t.cpu_s for t in trained) / num_runs
    console.print(f"a run took {each:.1f} s, of which {busy:.1f} s of processor in its own process, forks included")
