"""`esper tamiyo compare`: the same runs under every policy, and what they came to."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from esper.cli.tamiyo.corpus import RANDOM_TAMIYO, services_of
from esper.cli.tamiyo.publish import publish_policy
from esper.config import Settings, load_settings
from esper.errors import ConfigError, UnavailableError
from esper.logging import configure_logging
from esper.oona.admin.topics import verify_topics
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.policy_versions import trained_versions

if TYPE_CHECKING:
    from esper.services.tolaria.corpus.training_corpus import PlanTrainer, RunPlan, TrainedRun
    from esper.services.tolaria.study.policy_study import Mean, Row

ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "random": RANDOM_TAMIYO,
    "schedule": {"ESPER_TAMIYO__POLICY": "schedule"},
    "heuristic": {"ESPER_TAMIYO__POLICY": "heuristic"},
    "active": {"ESPER_TAMIYO__POLICY": "active"},
}
"""Who decides, and how Tamiyo is told so; for all of them commands expire after 2 boundaries, as in the ground."""
GNN, COMPARED = "gnn", "to be compared"
KNOWN_TIMEOUT_S, POLL_S = 30.0, 0.1
HELD_OUT_SEED = 9_000
"""Of the plans, unless another is named: no ground was ever drawn from it."""


def register(tamiyo: typer.Typer) -> None:
    """Add the command."""
    tamiyo.command()(compare)


def compare(
    runs: int = typer.Option(12, min=1, help="So many runs under each policy, on hosts that the ground draws too."),
    hosts: int = typer.Option(12, min=0, help="So many more, on hosts that it never draws."),
    policies: list[str] = typer.Option(
        list(ENVIRONMENTS), "--policy", help=f"Who decides (may be given again): {', '.join(ENVIRONMENTS)}."
    ),
    seed: int = typer.Option(HELD_OUT_SEED, min=0, help="Where the plans' chance starts: not that of a ground."),
    processes: int = typer.Option(4, min=1, help="Runs at once."),
    pace: float = typer.Option(0.3, min=0.0, help="Least seconds between two boundaries of a run."),
    folder: Path = typer.Option(Path("runs"), help="Where the runs keep their local state, and the services log."),
    fitted: Path | None = typer.Option(
        None, help="First publish and activate what `esper tamiyo retrain --into` wrote here: it is `active` then."
    ),
    into: Path | None = typer.Option(None, help="Write the table into this file too, as JSON."),
) -> None:
    """Train the same runs under each policy, and show what growth brought and cost; needs a running stack (`esper up`).

    Beside them: the network that never grows, what other batches alone do to it, and the network that each policy but
    `random` ended with, trained from scratch. Gains are paired by run; intervals 95 %.
    """
    from esper.services.tamiyo.versions.publication import read_fitted
    from esper.services.tolaria.corpus.training_corpus import CorpusSettings, plans

    unknown = [name for name in policies if name not in ENVIRONMENTS]
    if unknown:
        raise ConfigError(f"--policy {unknown[0]}: there are {', '.join(ENVIRONMENTS)}")
    settings, console = load_settings(), Console()
    asyncio.run(verify_topics(settings.need_kafka()))
    if into is not None:
        into.parent.mkdir(parents=True, exist_ok=True)
    if fitted is not None:
        read_fitted(fitted)  # before anything is started
    configure_logging(settings.logging.model_copy(update={"level": "WARNING"}))
    quiet = settings.model_copy(update={"logging": settings.logging.model_copy(update={"level": "ERROR"})})
    common = CorpusSettings(seed, folder.resolve(), pace, 0.0)
    wanted = {"held-out runs": (common, runs), "held-out hosts": (replace(common, uses_held_out_hosts=True), hosts)}
    rooms = {title: list(islice(plans(ground), num)) for title, (ground, num) in wanted.items() if num}
    if fitted is not None:
        with services_of(common.folder, console, ENVIRONMENTS["schedule"]):
            _put_in_charge(fitted)
    found = _Comparison(quiet, console, processes, rooms, common.folder, into).rows(list(dict.fromkeys(policies)))
    for title, rows in found.items():
        console.print(_table(title, rows))


def _put_in_charge(fitted: Path) -> None:
    """Publish a policy, and have it decide whatever evaluation says: to be compared is not yet to be trusted."""
    from esper.cli.tamiyo.versions import activate

    version = publish_policy(fitted, GNN, COMPARED)
    try:
        asyncio.run(_until_known(version))
    except TimeoutError:
        raise UnavailableError(
            f"{GNN} v{version} is published, and no worker folded that within {KNOWN_TIMEOUT_S:.0f} s: see the logs"
        ) from None
    activate(GNN, version, COMPARED, force=True)


async def _until_known(version: int) -> None:
    async with (
        asyncio.timeout(KNOWN_TIMEOUT_S),
        connect_pool(load_settings().need_postgres()) as pool,
        pool.acquire() as connection,
    ):
        while True:
            found = await trained_versions(connection)
            if any((v.version.policy_id, v.version.version) == (GNN, version) for v in found):
                return
            await asyncio.sleep(POLL_S)


class _Comparison:
    """Trains the plans of all rooms, policy after policy, so that services begin once for each.

    Args:
        rooms: the plans by the title of their table.
        folder: where services log.
        into: gets the table so far as JSON, whenever a policy's runs have ended; None writes none.
    """

    def __init__(
        self,
        settings: Settings,
        console: Console,
        num_processes: int,
        rooms: "Mapping[str, Sequence[RunPlan]]",
        folder: Path,
        into: Path | None,
    ) -> None:
        self._settings, self._console, self._num = settings, console, num_processes
        self._rooms, self._folder, self._into = rooms, folder, into
        self._found: dict[str, dict[str, list[TrainedRun]]] = {title: {} for title in rooms}

    def rows(self, policies: Sequence[str]) -> dict[str, list["Row"]]:
        """Train them all; gives the rows of each table."""
        from esper.services.tolaria.corpus.training_corpus import train_plan
        from esper.services.tolaria.study import policy_study as c

        tag = f"{time.time():.0f}"
        self._train(c.NEVER_GROWS, c.train_never_growing, self._rooms)
        self._train(c.OTHER_BATCHES, c.train_on_other_batches, self._rooms)
        for policy in policies:
            with services_of(self._folder, self._console, ENVIRONMENTS[policy]):
                named = {title: c.under(policy, plans, tag) for title, plans in self._rooms.items()}
                self._train(policy, train_plan, named)
            if policy != "random":
                grown = {title: c.from_scratch(found[policy]) for title, found in self._found.items()}
                self._train(f"{policy}, {c.FROM_SCRATCH}", c.train_from_scratch, grown)
        return self._so_far()

    def _so_far(self) -> dict[str, list["Row"]]:
        from esper.services.tolaria.study.policy_study import rows_of

        return {title: rows_of(found) for title, found in self._found.items()}

    def _train(self, name: str, how: "PlanTrainer", wanted: "Mapping[str, Sequence[RunPlan]]") -> None:
        from esper.services.tolaria.corpus.training_corpus import train_plans
        from esper.services.tolaria.study.policy_study import in_order

        every = [plan for plans in wanted.values() for plan in plans]
        began = time.monotonic()
        ended = train_plans(every, self._settings, how=how, num_processes=self._num)
        for one in ended:
            if one.problem:
                self._say(f"{one.plan.run_id} failed: {one.problem}")
        self._say(f"{name}: {len(ended)} runs in {time.monotonic() - began:.0f} s")
        for title, plans in wanted.items():
            self._found[title][name] = in_order(plans, ended)
        self._tell()

    def _tell(self) -> None:
        """The newest row of each table, and all of them into the file: who interrupts this keeps what there is."""
        found = self._so_far()
        for title, rows in found.items():
            if rows:
                self._say(f"  {title}: accuracy {_interval(rows[-1].accuracy, '{:.3f}')}, gain {_gain(rows[-1])}")
        if self._into is not None:
            told = {title: [asdict(row) for row in rows] for title, rows in found.items()}
            self._into.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)


def _table(title: str, rows: Sequence["Row"]) -> Table:
    num = rows[0].num_plans if rows else 0
    table = Table(
        "policy", "accuracy", "gain over wait", "parameters", "training FLOPs", "grown", title=f"{title} ({num})"
    )
    for row in rows:
        accuracy, gain = _interval(row.accuracy, "{:.3f}"), _gain(row)
        cost = f"{row.parameters:.2f}x", f"{row.training_flops:.2f}x", f"{row.num_grown:.1f}"
        table.add_row(row.name, accuracy, gain, *cost)
    return table


def _gain(row: "Row") -> str:
    return _interval(row.gain, "{:+.3f}")


def _interval(mean: "Mean", form: str) -> str:
    if mean.low is None:
        return form.format(mean.value)
    return f"{form.format(mean.value)} ({form.format(mean.low)} to {form.format(mean.high)})"
