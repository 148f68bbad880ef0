"""The demo's report: what training came to, what grew where and why, and what it left in the log."""

import asyncio
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from esper.cli.streams.projections import cause_table, lag_table
from esper.config import Settings
from esper.schemas.assets import TrainingResults
from esper.services.tolaria.orchestrator import ServiceHealth
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.projection_status import TopicLag, topic_lags
from esper.streams.read_models.seed_causes import changed_seeds, causes_of_seed

CATCH_UP_S = 20.0  # how long the report waits for the last events to be folded
POLL_S = 0.2


async def print_report(
    console: Console,
    settings: Settings,
    run_id: str,
    plain: TrainingResults,
    grown: TrainingResults,
    health: tuple[ServiceHealth, ...],
) -> int:
    """Print it; gives the number of seeds that were grafted and came to an end."""
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        behind = await _caught_up(connection, settings)
        console.rule(f"[bold]Report of {run_id}")
        console.print(_results(plain, grown))
        num_grown = await _stories(console, connection, run_id)
        await _decisions(console, connection, run_id)
        console.print("\n[bold]Events per topic, and how many are not folded into Postgres yet[/bold]")
        console.print(lag_table(behind))
    down = [h.name for h in health if not h.is_alive]
    restarts = sum(h.num_restarts for h in health)
    state = f"[red]down: {', '.join(down)}[/red]" if down else "all alive"
    console.print(f"Services: {state}, {restarts} restart(s).")
    console.print(
        "\n[bold]Where to look next[/bold]\n"
        "  esper up                       the same stack, kept running for your own work\n"
        "  esper train configs/digits.yaml    this run, on that stack\n"
        "  esper why RUN LAYER:SEED       the chain of causes of one seed\n"
        "  esper events tail TOPIC        the log itself\n"
        "  esper projections verify       proof that the rows are what the log says\n"
        "  README.md, docs/design/policies.md   how it works, and by which rule Tamiyo decided"
    )
    return num_grown


def _results(plain: TrainingResults, grown: TrainingResults) -> Table:
    table = Table("", "without Esper", "with Esper")
    table.add_row("accuracy at the start", _percent(plain.initial_accuracy), _percent(grown.initial_accuracy))
    table.add_row("accuracy at the end", _percent(plain.final_accuracy), _percent(grown.final_accuracy))
    table.add_row("adaptations", "-", str(grown.adaptations_applied))
    table.add_row("training time", f"{plain.duration_s:.1f} s", f"{grown.duration_s:.1f} s")
    table.add_row("spent in Esper's calls", "-", f"{grown.overhead_percent:.1f} % of the loop")
    more = 100.0 * (grown.duration_s / plain.duration_s - 1.0)
    table.add_row("whole loop against the plain one", "-", f"{more:+.1f} % (what grew computes too)")
    return table


async def _stories(console: Console, connection: Any, run_id: str) -> int:
    num_ended = 0
    for layer_id, seed_id in await changed_seeds(connection, run_id):
        causes = await causes_of_seed(connection, run_id, layer_id, seed_id)
        ends = [c.told for c in causes if c.kind == "field report"]
        num_ended += any(told.startswith(("fossilized", "culled")) for told in ends)
        end = ends[-1].split(":")[0] if ends else "still under way when training ended"
        console.print(f"\n[bold]{layer_id}:{seed_id}[/bold] {end}")
        console.print(cause_table(causes))
    return num_ended


async def _decisions(console: Console, connection: Any, run_id: str) -> None:
    rows = await connection.fetch(
        "SELECT action, stale, count(*) AS n FROM decisions WHERE run_id = $1 GROUP BY 1, 2 ORDER BY 3 DESC, 1",
        run_id,
    )
    told = ", ".join(f"{r['n']} {r['action']}{' (stale)' if r['stale'] else ''}" for r in rows)
    console.print(f"\n[bold]Decisions[/bold]: {told or 'none'}")


async def _caught_up(connection: Any, settings: Settings) -> list[TopicLag]:
    deadline = time.monotonic() + CATCH_UP_S
    while True:
        found = await topic_lags(connection, settings.need_kafka())
        if not sum(t.lag or 0 for t in found) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(POLL_S)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
