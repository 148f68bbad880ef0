"""The demo's report: results of both trainings, the seeds that grew and why, and the events in Kafka."""

from rich.console import Console
from rich.table import Table

from esper.cli.database import poll_until
from esper.cli.streams.projection_status import lag_table
from esper.cli.streams.seed_causes import cause_table
from esper.cli.terminal import new_table, print_line, print_table
from esper.config import Settings
from esper.schemas.assets import TrainingResults
from esper.services.tolaria.orchestrator import ServiceHealth
from esper.streams.database.connection_types import Connection
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.projection_status import topic_lags
from esper.streams.read_models.seed_causes import causes_of_seed, changed_seeds

CATCH_UP_TIMEOUT_S = 20.0
"""How long the report waits until the last events are projected."""
FINAL_OUTCOMES = ("fossilized", "culled")
NEXT_STEPS = """
[bold]Next steps[/bold]
  esper up                         start the same stack for your own work
  esper train configs/digits.yaml  train on that stack
  esper why RUN LAYER:SEED         explain what happened to a seed
  esper events tail TOPIC          read the events themselves
  esper projections verify         check the tables in Postgres against the log
  README.md, docs/                 how Esper works and how Tamiyo decides"""


async def print_report(
    settings: Settings,
    run_id: str,
    baseline: TrainingResults,
    grown: TrainingResults,
    health: tuple[ServiceHealth, ...],
) -> int:
    """Print the report. Returns the number of seeds that grew and were then kept or removed."""
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        lags = await poll_until(
            lambda: topic_lags(connection, settings.need_kafka()),
            lambda found: not any(topic.lag for topic in found),
            CATCH_UP_TIMEOUT_S,
        )
        Console().rule(f"[bold]Results of run {run_id}")
        print_table(_results_table(baseline, grown))
        points = 100 * (grown.final_accuracy - baseline.final_accuracy)
        print_line(
            f"The growing network ended {abs(points):.1f} points {'above' if points >= 0 else 'below'} the fixed one. "
            "One run with one random seed: it shows how growth works, not how much it gains on average."
        )
        num_ended = await _print_seeds(connection, run_id)
        await _print_decisions(connection, run_id)
        print_line("\n[bold]Events in Kafka[/bold] (lag: not yet projected into Postgres)")
        print_table(lag_table(lags))
    down = [h.name for h in health if not h.is_alive]
    state = f"[red]down: {', '.join(down)}[/red]" if down else "all running"
    print_line(f"Services: {state}, {sum(h.num_restarts for h in health)} restart(s)")
    print_line(NEXT_STEPS)
    return num_ended


def _results_table(baseline: TrainingResults, grown: TrainingResults) -> Table:
    table = new_table("", numbers=("without Esper", "with Esper"))
    table.add_row("accuracy at the start", _percent(baseline.initial_accuracy), _percent(grown.initial_accuracy))
    table.add_row("accuracy at the end", _percent(baseline.final_accuracy), _percent(grown.final_accuracy))
    table.add_row("adaptations", "-", str(grown.adaptations_applied))
    table.add_row("training time", f"{baseline.duration_s:.1f} s", f"{grown.duration_s:.1f} s")
    share_in_calls = grown.overhead_percent / (100.0 + grown.overhead_percent)
    table.add_row("of it, inside Esper's calls", "-", f"{share_in_calls * grown.duration_s:.1f} s")
    slowdown = 100.0 * (grown.duration_s / baseline.duration_s - 1.0)
    table.add_row("slowdown, with the compute of what grew", "-", f"{slowdown:+.1f} %")
    return table


async def _print_seeds(connection: Connection, run_id: str) -> int:
    num_ended = 0
    print_line("\n[bold]What grew, and why[/bold] (a seed LAYER:NUMBER is a place in a layer where a module can grow)")
    for layer_id, seed_id in await changed_seeds(connection, run_id):
        causes = await causes_of_seed(connection, run_id, layer_id, seed_id)
        reports = [c.description for c in causes if c.kind == "field report"]
        num_ended += any(report.startswith(FINAL_OUTCOMES) for report in reports)
        outcome = reports[-1].split(":")[0] if reports else "still in progress when training ended"
        print_line(f"\nseed [bold]{layer_id}:{seed_id}[/bold]: {outcome}")
        print_table(cause_table(causes))
    return num_ended


async def _print_decisions(connection: Connection, run_id: str) -> None:
    rows = await connection.fetch(
        "SELECT action, stale, count(*) AS n FROM decisions WHERE run_id = $1 GROUP BY 1, 2 ORDER BY 3 DESC, 1",
        run_id,
    )
    counts = ", ".join(f"{r['n']} {r['action']}{' (stale)' if r['stale'] else ''}" for r in rows)
    print_line(f"\n[bold]Decisions of Tamiyo[/bold]: {counts or 'none'}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
