"""`esper tamiyo compare`: trains the same runs under several policies and compares the results."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli.database import database_connection, poll_until
from esper.cli.tamiyo.corpus import RANDOM_TAMIYO, errors_only, running_services
from esper.cli.tamiyo.publish import publish_policy
from esper.cli.terminal import format_interval, print_line, print_table
from esper.config import Settings, load_settings
from esper.errors import ConfigError, UnavailableError
from esper.logging import configure_logging
from esper.oona.admin.topics import verify_topics
from esper.streams.read_models.policy_versions import trained_versions

if TYPE_CHECKING:
    from esper.services.tolaria.corpus.training_corpus import PlanTrainer, RunPlan, TrainedRun
    from esper.services.tolaria.study.policy_study import PolicyResult

ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "random": RANDOM_TAMIYO,
    "schedule": {"ESPER_TAMIYO__POLICY": "schedule"},
    "heuristic": {"ESPER_TAMIYO__POLICY": "heuristic"},
    "active": {"ESPER_TAMIYO__POLICY": "active"},
}
"""Environment variables of Tamiyo, by policy."""
GNN, REASON = "gnn", "to be compared"
PUBLISH_TIMEOUT_S = 30.0
HELD_OUT_SEED = 9_000
"""Default seed of the plans. No training corpus was drawn from it."""


def compare(
    runs: int = typer.Option(12, min=1, help="Runs under each policy on networks like those of the training corpus."),
    hosts: int = typer.Option(12, min=0, help="Runs under each policy on networks that no training corpus has."),
    policies: list[str] = typer.Option(
        list(ENVIRONMENTS), "--policy", help=f"Policy to compare: {', '.join(ENVIRONMENTS)}. Repeatable."
    ),
    seed: int = typer.Option(HELD_OUT_SEED, min=0, help="Random seed of the plans; must not be that of a corpus."),
    processes: int = typer.Option(4, min=1, help="Number of runs that train at the same time."),
    min_boundary_interval: float = typer.Option(
        0.3, min=0.0, help="Minimum seconds between two boundaries of a run, so that Tamiyo keeps up."
    ),
    folder: Path = typer.Option(Path("runs"), help="Folder for the local state of the runs and the services' logs."),
    fitted: Path | None = typer.Option(
        None, help="Folder from `esper tamiyo retrain --into`: publish and activate this policy first."
    ),
    into: Path | None = typer.Option(None, help="File to write the table into, as JSON."),
) -> None:
    """Train the same runs under each policy and compare accuracy and cost. Needs a running stack (`esper up`).

    The table also has the network that never grows, the effect of other batches alone, and the network that each
    policy except `random` ended with, trained from scratch. Gains are paired by run; intervals are 95 %.
    """
    from esper.services.tamiyo.versions.publication import read_fitted
    from esper.services.tolaria.corpus.training_corpus import CorpusSettings, draw_plans

    unknown = [name for name in policies if name not in ENVIRONMENTS]
    if unknown:
        raise ConfigError(f"--policy {unknown[0]}: no such policy; choose from {', '.join(ENVIRONMENTS)}")
    settings = load_settings()
    asyncio.run(verify_topics(settings.need_kafka()))
    if into is not None:
        into.parent.mkdir(parents=True, exist_ok=True)
    if fitted is not None:
        read_fitted(fitted)  # fails before anything is started
    configure_logging(settings.logging.model_copy(update={"level": "WARNING"}))
    common = CorpusSettings(seed, folder.resolve(), min_boundary_interval, 0.0)
    groups = {"held-out runs": (common, runs), "held-out hosts": (replace(common, uses_held_out_hosts=True), hosts)}
    plans_by_title = {title: list(islice(draw_plans(corpus), num)) for title, (corpus, num) in groups.items() if num}
    if fitted is not None:
        with running_services(common.folder, ENVIRONMENTS["schedule"]):
            _activate_fitted(fitted)
    comparison = _Comparison(errors_only(settings), processes, plans_by_title, common.folder, into)
    for title, rows in comparison.rows(list(dict.fromkeys(policies))).items():
        print_table(_comparison_table(title, rows))


def _activate_fitted(folder: Path) -> None:
    """Publish a policy and activate it, even if its evaluation does not find it better."""
    from esper.cli.tamiyo.versions import activate

    version = publish_policy(folder, GNN, REASON)
    if not asyncio.run(_is_projected(version)):
        raise UnavailableError(
            f"{GNN} v{version} was published, but not projected within {PUBLISH_TIMEOUT_S:.0f} s; read the worker's log"
        )
    activate(GNN, version, REASON, force=True)


async def _is_projected(version: int) -> bool:
    async with database_connection() as connection:

        async def read() -> bool:
            found = await trained_versions(connection)
            return any((v.version.policy_id, v.version.version) == (GNN, version) for v in found)

        return await poll_until(read, bool, PUBLISH_TIMEOUT_S)


class _Comparison:
    """Trains all plans, policy after policy, so that services start once for each policy.

    Args:
        plans: by the title of their table.
        folder: gets the services' logs.
        into: gets the table so far as JSON, each time the runs of a policy have ended; None writes none.
    """

    def __init__(
        self,
        settings: Settings,
        num_processes: int,
        plans: "Mapping[str, Sequence[RunPlan]]",
        folder: Path,
        into: Path | None,
    ) -> None:
        self._settings, self._num_processes = settings, num_processes
        self._plans, self._folder, self._into = plans, folder, into
        self._trained: dict[str, dict[str, list[TrainedRun]]] = {title: {} for title in plans}

    def rows(self, policies: Sequence[str]) -> dict[str, list["PolicyResult"]]:
        """Train all plans. Returns the rows of each table."""
        from esper.services.tolaria.corpus.training_corpus import train_plan
        from esper.services.tolaria.study import policy_study as study

        tag = f"{time.time():.0f}"
        self._train(study.NEVER_GROWS, study.train_never_growing, self._plans)
        self._train(study.OTHER_BATCHES, study.train_on_other_batches, self._plans)
        for policy in policies:
            with running_services(self._folder, ENVIRONMENTS[policy]):
                renamed = {title: study.plans_under_policy(policy, plans, tag) for title, plans in self._plans.items()}
                self._train(policy, train_plan, renamed)
            if policy != "random":
                grown = {title: study.from_scratch_plans(trained[policy]) for title, trained in self._trained.items()}
                self._train(f"{policy}, {study.FROM_SCRATCH}", study.train_from_scratch, grown)
        return self._rows()

    def _rows(self) -> dict[str, list["PolicyResult"]]:
        from esper.services.tolaria.study.policy_study import policy_results

        return {title: policy_results(trained) for title, trained in self._trained.items()}

    def _train(self, name: str, train: "PlanTrainer", plans: "Mapping[str, Sequence[RunPlan]]") -> None:
        from esper.services.tolaria.corpus.training_corpus import train_plans
        from esper.services.tolaria.study.policy_study import in_plan_order

        began = time.monotonic()
        every = [plan for some in plans.values() for plan in some]
        ended = train_plans(every, self._settings, train=train, num_processes=self._num_processes)
        for run in ended:
            if run.error:
                print_line(escape(f"{run.plan.run_id} failed: {run.error}"))
        print_line(f"{name}: {len(ended)} runs in {time.monotonic() - began:.0f} s")
        for title, some in plans.items():
            self._trained[title][name] = in_plan_order(some, ended)
        self._report()

    def _report(self) -> None:
        """Print the newest row of each table and write all rows, so that an interruption loses no results."""
        found = self._rows()
        for title, rows in found.items():
            if rows:
                print_line(f"  {title}: accuracy {_accuracy(rows[-1])}, gain {_gain(rows[-1])}")
        if self._into is not None:
            fields = {title: [asdict(row) for row in rows] for title, rows in found.items()}
            self._into.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _comparison_table(title: str, rows: Sequence["PolicyResult"]) -> Table:
    num_plans = rows[0].num_plans if rows else 0
    columns = ("accuracy", "gain over wait", "parameters", "training FLOPs", "kernels grown")
    table = Table("policy", *columns, title=f"{title} ({num_plans})")
    for row in rows:
        costs = f"{row.parameters:.2f}x", f"{row.training_flops:.2f}x", f"{row.num_grown:.1f}"
        table.add_row(row.name, _accuracy(row), _gain(row), *costs)
    return table


def _accuracy(row: "PolicyResult") -> str:
    return format_interval(row.accuracy.value, row.accuracy.low, row.accuracy.high, "{:.3f}")


def _gain(row: "PolicyResult") -> str:
    return format_interval(row.gain.value, row.gain.low, row.gain.high, "{:+.3f}")
