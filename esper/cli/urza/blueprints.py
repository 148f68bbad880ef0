"""`esper blueprints`: costs of the modules that can grow, and the lifecycle of every blueprint."""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError
from rich.markup import escape

from esper.cli.command_group import Commands, add_group
from esper.cli.database import PROJECTION_TIMEOUT_S, poll_until
from esper.cli.terminal import EXIT_ERROR, new_table, print_line, print_table
from esper.cli.urza.blueprint_tables import blueprints_table, format_module, lineage_tables, outcomes_table
from esper.config import load_settings
from esper.config.yaml_file import read_yaml
from esper.errors import ConfigError, ContractError, KernelError
from esper.kasmina.catalogue import CATALOGUE, cost_of
from esper.oona.cloudevents import explain
from esper.oona.producer import OonaProducer
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import BlueprintChange, BlueprintStatus, LayerKind, Verdict
from esper.schemas.events import BlueprintChangeRequested
from esper.services.urza import library_queries
from esper.services.urza.blueprint_changes import BlueprintChanges, ChangeOutcome
from esper.services.urza.kernels.shipped_blueprints import SHIPPED
from esper.services.urza.projection_reader import ProjectionReader, Row
from esper.streams.database.connections import connect_pool

SOURCE = "esper-blueprints"
MAX_ROWS = 500
WAITING_STATUSES = (BlueprintStatus.PROPOSED, BlueprintStatus.COMPILED)

T = TypeVar("T")
Ids = Annotated[list[str], typer.Argument(help="Blueprint ids.", metavar="ID...")]
Reason = Annotated[str, typer.Option(help="Reason; recorded in the log.")]
Key = Annotated[str | None, typer.Option(help="Idempotency key: a repeated request with it changes nothing.")]
MakeRequests = Callable[[BlueprintChanges, str], Awaitable[list[BlueprintChangeRequested]]]
"""Returns the requests of a command for an idempotency key."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands: Commands = {
        "list": list_all,
        "show": show,
        "propose": propose,
        "certify": certify,
        "reject": reject,
        "retire": retire,
    }
    about = "List, propose and certify blueprints: the modules that can grow."
    group = add_group(app, "blueprints", about, commands)
    group.info.no_args_is_help = False
    group.callback(invoke_without_command=True, help=f"{about} Without a command, print costs.")(costs)


def costs(
    context: typer.Context,
    features: int = typer.Option(64, min=1, help="Output features (channels) of the layer."),
    kind: LayerKind = typer.Option(LayerKind.LINEAR, help="Kind of layer."),
    positions: int = typer.Option(
        1, min=1, help="Positions of a sample: vectors of a linear layer, length or height x width of a convolution."
    ),
) -> None:
    """Print the parameters and FLOPs of each shipped blueprint that fits a layer."""
    if context.invoked_subcommand is not None:
        return
    title = f"{kind}, {features} features, {positions} position(s)"
    table = new_table("blueprint", "s(h)", numbers=("parameters", "FLOPs", "hidden / h"), title=title)
    for blueprint_id, spec in SHIPPED.items():
        if kind not in spec.targets:
            continue
        equation = CATALOGUE[spec.module].equation
        try:
            cost = cost_of(spec, kind, features)
        except KernelError as error:
            table.add_row(blueprint_id, f"refused: {error}", "-", "-", "-")
            continue
        widening = f"{cost.hidden_features / features:.3g}"
        table.add_row(blueprint_id, equation, f"{cost.num_parameters:,}", f"{cost.flops(positions):,}", widening)
    print_table(table)
    print_line("FLOPs of one forward pass of one sample; a multiply-add of a matrix product or convolution counts two")


def list_all(
    status: Annotated[BlueprintStatus | None, typer.Option(help="Only blueprints with this status.")] = None,
    waiting: Annotated[bool, typer.Option("--waiting", help="Only blueprints that wait for certification.")] = False,
) -> None:
    """List blueprints."""

    async def read(reader: ProjectionReader) -> list[Row]:
        if waiting:
            return await library_queries.unvalidated(reader, limit=MAX_ROWS)
        return await library_queries.blueprints(reader, status=status, limit=MAX_ROWS)

    print_table(blueprints_table(_read(read)))


def show(blueprint_id: Annotated[str, typer.Argument(help="Blueprint id.", metavar="ID")]) -> None:
    """Show a blueprint: its changes, certificates, kernels and uses."""
    found = _read(lambda reader: library_queries.lineage(reader, blueprint_id))
    if found is None:
        raise ContractError(f"blueprint {blueprint_id!r} does not exist; `esper blueprints list` lists all")
    row, spec = found.blueprint, found.blueprint["spec"]
    print_line(f"[bold]{row['blueprint_id']}[/bold] is {row['status']} (version {row['version']})")
    print_line(f"{format_module(spec)} for {', '.join(spec['targets'])}; {escape(spec['description'])}")
    for table in lineage_tables(found):
        print_table(table)


def propose(
    file: Annotated[
        Path, typer.Argument(help="YAML or JSON file: blueprint id -> module, parameters, targets, description.")
    ],
    reason: Reason = "",
    key: Key = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until Urza has certified or rejected each one.")] = False,
) -> None:
    """Propose blueprints. A running Urza certifies or rejects each one."""
    specs = read_specs(file)

    async def proposals(changes: BlueprintChanges, key: str) -> list[BlueprintChangeRequested]:
        versions = await changes.expected_versions(list(specs), key=key)
        return [
            BlueprintChangeRequested(
                blueprint_id=blueprint_id,
                change="propose",
                expected_version=versions.get(blueprint_id, 0),
                spec=spec,
                reason=reason,
            )
            for blueprint_id, spec in specs.items()
        ]

    outcomes = _request(proposals, key)
    if wait and all(o.verdict is Verdict.ACCEPTED for o in outcomes):
        rows = _read(lambda reader: _read_validated(reader, list(specs)))
        for row in rows:
            name = row["blueprint_id"]
            typer.echo(f"{name} is {row['status']}: `esper blueprints show {name}` shows the reason")
        if any(r["status"] == BlueprintStatus.REJECTED for r in rows):
            raise typer.Exit(EXIT_ERROR)


def certify(ids: Ids, reason: Reason = "", key: Key = None) -> None:
    """Certify compiled blueprints by hand. They have no certificate."""
    _request_change(BlueprintChange.CERTIFY, ids, reason, key)


def reject(ids: Ids, reason: Reason = "", key: Key = None) -> None:
    """Reject blueprints that are not certified."""
    _request_change(BlueprintChange.REJECT, ids, reason, key)


def retire(ids: Ids, reason: Reason = "", key: Key = None) -> None:
    """Retire certified blueprints. Tamiyo no longer chooses them; their kernels stay for runs that use them."""
    _request_change(BlueprintChange.RETIRE, ids, reason, key)


def read_specs(file: Path) -> dict[str, BlueprintSpec]:
    """The blueprints in a file, by id.

    Raises:
        ConfigError: the file cannot be read, proposes nothing, or has an invalid blueprint.
    """
    specs = {}
    for blueprint_id, value in read_yaml(file).values.items():
        try:
            specs[blueprint_id] = BlueprintSpec.model_validate(value)
            BlueprintChangeRequested(blueprint_id=blueprint_id, change="propose", expected_version=0, spec=value)
        except ValidationError as error:
            raise ConfigError(f"{file}: {blueprint_id}: {explain(error)}") from None
    if not specs:
        raise ConfigError(f"{file} has no blueprints; write an id, and below it module, targets and parameters")
    return specs


def _request_change(change: BlueprintChange, ids: list[str], reason: str, key: str | None) -> None:
    _request(lambda changes, key: changes.same_change(change, ids, key=key, reason=reason), key)


def _request(make_requests: MakeRequests, key: str | None) -> list[ChangeOutcome]:
    """Request changes and print their verdicts. Exits with 1 unless all are accepted."""
    key = key or str(uuid.uuid4())

    async def request() -> list[ChangeOutcome]:
        kafka = load_settings().need_kafka()
        async with _projection_reader() as reader, OonaProducer(kafka, client_id=SOURCE) as producer:
            changes = BlueprintChanges(reader, producer)
            requests = await make_requests(changes, key)
            return await changes.request(requests, key=key, source=SOURCE, timeout_s=PROJECTION_TIMEOUT_S)

    outcomes = asyncio.run(request())
    pending = f"sent, not projected after {PROJECTION_TIMEOUT_S:g} s; check that a worker is running"
    print_table(outcomes_table(outcomes, key, pending))
    if any(o.verdict is not Verdict.ACCEPTED for o in outcomes):
        raise typer.Exit(EXIT_ERROR)
    return outcomes


@asynccontextmanager
async def _projection_reader() -> AsyncIterator[ProjectionReader]:
    postgres = load_settings().need_postgres()
    async with connect_pool(postgres) as pool:
        yield ProjectionReader(pool, postgres)


def _read(read: Callable[[ProjectionReader], Awaitable[T]]) -> T:
    async def run() -> T:
        async with _projection_reader() as reader:
            return await read(reader)

    return asyncio.run(run())


async def _read_validated(reader: ProjectionReader, blueprint_ids: list[str]) -> list[Row]:
    """The blueprints, once each is certified or rejected."""
    return await poll_until(
        lambda: library_queries.versions(reader, blueprint_ids),
        lambda rows: all(row["status"] not in WAITING_STATUSES for row in rows),
        timeout_s=math.inf,
    )
