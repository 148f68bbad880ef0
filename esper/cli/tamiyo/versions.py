"""`esper tamiyo`: the group of commands, and those that list, activate and roll back versions of policies."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli.command_group import Commands, add_group
from esper.cli.database import PROJECTION_TIMEOUT_S, database_connection, poll_until
from esper.cli.tamiyo.compare import compare
from esper.cli.tamiyo.corpus import corpus
from esper.cli.tamiyo.evaluate import evaluate
from esper.cli.tamiyo.publish import SOURCE, publish
from esper.cli.tamiyo.replay import replay
from esper.cli.tamiyo.retrain import retrain
from esper.cli.terminal import format_time, new_table, print_line, print_table
from esper.config import load_settings
from esper.oona.producer import OonaProducer
from esper.schemas.messages import OonaMessage
from esper.streams.database.connection_types import Connection
from esper.streams.read_models.policy_versions import (
    Evaluation,
    PolicyChange,
    TrainedVersion,
    active_policy,
    evaluations,
    policy_changes,
    trained_versions,
)

Reason = Annotated[str, typer.Option(help="Reason; required, and recorded in the log.")]


def register(app: typer.Typer) -> None:
    """Add the commands, in the order of a policy's lifecycle."""
    commands: Commands = {
        "corpus": corpus,
        "replay": replay,
        "retrain": retrain,
        "evaluate": evaluate,
        "publish": publish,
        "policies": policies,
        "activate": activate,
        "rollback": rollback,
        "compare": compare,
    }
    add_group(app, "tamiyo", "Train, evaluate and activate policies.", commands)


def policies(
    num: int = typer.Option(20, "--changes", min=1, help="Number of the newest activations to print."),
) -> None:
    """List policy versions, their evaluations, and which version was active when."""

    async def read() -> tuple[list[TrainedVersion], list[Evaluation], list[PolicyChange], PolicyChange | None]:
        async with database_connection() as connection:
            changes = await policy_changes(connection, num=num, include_by_settings=True)
            found = await trained_versions(connection), await evaluations(connection)
            return *found, changes, await active_policy(connection)

    trained, evaluated, changes, active = asyncio.run(read())
    if not (trained or evaluated or changes):
        print_line("no policy has been trained or activated; a running Tamiyo records the policy of its settings")
        return
    print_line(f"active: {active.version}, since {format_time(active.since)}" if active else "active: none")
    if trained:
        print_table(_trained_table(trained))
    if evaluated:
        print_table(_evaluations_table(evaluated))
    print_table(_changes_table(changes))


def activate(
    policy: str = typer.Argument(help="Policy name."),
    version: int = typer.Argument(min=1, help="Version."),
    reason: Reason = "",
    force: bool = typer.Option(
        False, "--force", help="Activate even if no evaluation found it better than the active version."
    ),
) -> None:
    """Activate a version, if its evaluation found it better than the active one."""
    from esper.services.tamiyo.settings import TamiyoSettings
    from esper.services.tamiyo.versions.activation import activation, find_version, refusal_reason

    tamiyo = load_settings().section("tamiyo", TamiyoSettings)

    async def make_event(connection: Connection) -> OonaMessage:
        changes = await policy_changes(connection)
        active = changes[0] if changes else None
        wanted = find_version(policy, version, await trained_versions(connection), changes, tamiyo)
        refused = refusal_reason(wanted, active, await evaluations(connection))
        return activation(wanted, active, reason, SOURCE, refused=refused, is_forced=force)

    _send_and_wait(make_event)


def rollback(reason: Reason = "") -> None:
    """Activate the version that was active before the current one."""
    from esper.services.tamiyo.versions.activation import rollback as roll_back

    async def make_event(connection: Connection) -> OonaMessage:
        return roll_back(await policy_changes(connection), reason, SOURCE)

    _send_and_wait(make_event)


def _send_and_wait(make_event: Callable[[Any], Awaitable[OonaMessage]]) -> None:
    """Send the event that ``make_event`` derives from the projections, and wait until it is projected."""

    async def change() -> tuple[OonaMessage, PolicyChange | None]:
        async with database_connection() as connection:
            message = await make_event(connection)
            async with OonaProducer(load_settings().need_kafka(), client_id=SOURCE) as producer:
                await producer.send(message)

            def is_projected(active: PolicyChange | None) -> bool:
                return active is not None and active.id == message.id

            active = await poll_until(lambda: active_policy(connection), is_projected, PROJECTION_TIMEOUT_S)
            return message, active if is_projected(active) else None

    message, active = asyncio.run(change())
    if active is None:
        typer.echo(f"sent as event {message.id}, not projected yet; check that a worker is running")
    else:
        typer.echo(f"{active.version} decides now, wherever the setting tamiyo.policy is `active`")


def _trained_table(trained: Sequence[TrainedVersion]) -> Table:
    columns = ("version", "kind", "parent", "decisions", "bytes", "weights", "metrics", "trained at")
    table = new_table(*columns, title="Trained versions")
    for one in trained:
        figures = ", ".join(f"{name} {_format(value)}" for name, value in sorted(one.figures.items()))
        weights = one.version.weights
        assert weights is not None
        table.add_row(
            escape(str(one.version)), escape(one.version.kind), f"v{one.parent_version}" if one.parent_version else "",
            f"{one.num_decisions:,}", f"{weights.size_bytes:,}", weights.sha256[:12], escape(figures),
            format_time(one.at),
        )  # fmt: skip
    return table


def _evaluations_table(found: Sequence[Evaluation]) -> Table:
    """The reason of a verdict names the estimator, the estimate and its interval, or why there is none."""
    columns = ("version", "against", "verdict", "reason", "confidence", "effective size", "runs", "evaluated at")
    rows = [
        (
            escape(f"{one.policy_id} v{one.policy_version}"),
            escape(f"{one.against_policy_id} v{one.against_version}"),
            one.verdict,
            escape(one.reason),
            f"{one.confidence:.0%}",
            f"{one.effective_sample_size:.1f} of {one.num_decisions:,}",
            str(len(one.held_out_runs)),
            format_time(one.at),
        )
        for one in found
    ]
    return new_table(*columns, title="Evaluations on held-out runs", rows=rows)


def _changes_table(changes: Sequence[PolicyChange]) -> Table:
    rows = []
    for one in changes:
        how = "settings of one Tamiyo" if one.by_settings else "activated"
        if one.rolled_back_from is not None:
            how = escape("rolled back from {} v{}".format(*one.rolled_back_from))
        rows.append((format_time(one.since), escape(str(one.version)), how, escape(one.reason)))
    return new_table("since", "version", "how", "reason", title="Active versions, newest first", rows=rows)


def _format(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
