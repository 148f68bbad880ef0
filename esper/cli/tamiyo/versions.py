"""`esper tamiyo`: the versions of policies, what evaluation says of them, and which decides."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper.cli.tamiyo import compare, corpus, publish, replay
from esper.config import load_settings
from esper.oona.producer import OonaProducer
from esper.schemas.messages import OonaMessage
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.policy_versions import (
    Evaluation,
    PolicyChange,
    TrainedVersion,
    active_policy,
    evaluations,
    policy_changes,
    trained_versions,
)

SOURCE = "esper-tamiyo"
TIMEOUT_S = 10.0  # of the projection; the event itself is in the log by then
POLL_S = 0.1
NOTHING_YET = "no policy was ever activated, and none trained: a controller that runs says who decides"

Reason = Annotated[str, typer.Option(help="Why; it is kept in the log.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    tamiyo = typer.Typer(
        no_args_is_help=True, help="From the log to experiences, to a policy, to a verdict; and which version decides."
    )
    for room in (corpus, compare, replay, publish):
        room.register(tamiyo)
    tamiyo.command()(policies)
    tamiyo.command()(activate)
    tamiyo.command()(rollback)
    app.add_typer(tamiyo, name="tamiyo")


def policies(
    num: int = typer.Option(20, "--changes", min=1, help="Show so many of the newest changes of who decides."),
) -> None:
    """Show every version, what evaluation found of it, and who decides since when."""

    async def read() -> tuple[list[TrainedVersion], list[Evaluation], list[PolicyChange], PolicyChange | None]:
        async with _projections() as connection:
            changes = await policy_changes(connection, num=num, include_by_settings=True)
            found = await trained_versions(connection), await evaluations(connection)
            return *found, changes, await active_policy(connection)

    trained, found, changes, active = asyncio.run(read())
    console = Console()
    if not (trained or found or changes):
        console.print(NOTHING_YET)
        return
    console.print(f"active: {active.version}, since {_when(active.since)}" if active else "active: none")
    if trained:
        console.print(_trained_table(trained))
    if found:
        console.print(_evaluations_table(found))
    console.print(_changes_table(changes))


def activate(
    policy: str = typer.Argument(help="The policy."),
    version: int = typer.Argument(min=1, help="Its version."),
    reason: Reason = "",
    force: bool = typer.Option(
        False, "--force", help="Also where no evaluation says that it is better than the one that is active."
    ),
) -> None:
    """Have a version decide from here on, if evaluation on the log says that it is better than the one that does."""
    from esper.services.tamiyo.settings import TamiyoSettings
    from esper.services.tamiyo.versions.activation import activation, find_version, refusal_reason

    tamiyo = load_settings().section("tamiyo", TamiyoSettings)

    async def make(connection: Any) -> OonaMessage:
        changes = await policy_changes(connection)
        active = changes[0] if changes else None
        wanted = find_version(policy, version, await trained_versions(connection), changes, tamiyo)
        refused = refusal_reason(wanted, active, await evaluations(connection))
        return activation(wanted, active, reason, SOURCE, refused=refused, is_forced=force)

    _change(make)


def rollback(reason: Reason = "") -> None:
    """Have the version decide again that did before the one that is active."""
    from esper.services.tamiyo.versions.activation import rollback as back

    async def make(connection: Any) -> OonaMessage:
        return back(await policy_changes(connection), reason, SOURCE)

    _change(make)


def _change(make: Any) -> None:
    """Write the event that ``make`` makes of what the projections say, and wait for its row."""

    async def change() -> tuple[OonaMessage, PolicyChange | None]:
        async with _projections() as connection:
            message = await make(connection)
            async with OonaProducer(load_settings().need_kafka(), client_id="esper-tamiyo") as producer:
                await producer.send(message)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    while (active := await active_policy(connection)) is None or active.id != message.id:
                        await asyncio.sleep(POLL_S)
            except TimeoutError:
                return message, None
            return message, active

    message, active = asyncio.run(change())
    if active is None:
        typer.echo(f"in the log as {message.id}; not in the projections yet: is a worker running?")
    else:
        typer.echo(f"{active.version} decides, for every controller whose setting tamiyo.policy is `active`")


@asynccontextmanager
async def _projections() -> AsyncIterator[Any]:
    async with connect_pool(load_settings().need_postgres()) as pool, pool.acquire() as connection:
        yield connection


def _trained_table(trained: Sequence[TrainedVersion]) -> Table:
    table = Table(title="trained", title_justify="left")
    for head in ("version", "kind", "from", "decisions", "bytes", "weights", "figures", "at"):
        table.add_column(head)
    for one in trained:
        figures = ", ".join(f"{name} {_shown(value)}" for name, value in sorted(one.figures.items()))
        weights = one.version.weights
        assert weights is not None
        table.add_row(
            escape(str(one.version)), escape(one.version.kind), f"v{one.parent_version}" if one.parent_version else "",
            f"{one.num_decisions:,}", f"{weights.size_bytes:,}", weights.sha256[:12], escape(figures), _when(one.at),
        )  # fmt: skip
    return table


def _evaluations_table(found: Sequence[Evaluation]) -> Table:
    table = Table(title="evaluated on held-out runs", title_justify="left")
    for head in (
        "version",
        "against",
        "verdict",
        "estimate",
        "interval",
        "estimator",
        "effective",
        "runs",
        "why",
        "at",
    ):
        table.add_column(head)
    for one in found:
        interval = f"{_shown(one.low)} .. {_shown(one.high)} ({one.confidence:.0%})"
        table.add_row(
            escape(f"{one.policy_id} v{one.policy_version}"), escape(f"{one.against_policy_id} v{one.against_version}"),
            one.verdict, _shown(one.estimate), interval, escape(one.estimator),
            f"{one.effective_sample_size:.1f} of {one.num_decisions:,}", str(len(one.held_out_runs)),
            escape(one.reason), _when(one.at),
        )  # fmt: skip
    return table


def _changes_table(changes: Sequence[PolicyChange]) -> Table:
    table = Table(title="who decided", title_justify="left")
    for head in ("since", "version", "how", "reason"):
        table.add_column(head)
    for one in changes:
        how = "settings of one controller" if one.by_settings else "activated"
        if one.rolled_back_from is not None:
            how = escape("rolled back from {} v{}".format(*one.rolled_back_from))
        table.add_row(_when(one.since), escape(str(one.version)), how, escape(one.reason))
    return table


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _when(at: Any) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"
