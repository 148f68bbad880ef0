"""`esper blueprints`: what can grow and what it costs; propose, certify, reject, retire, and what became of it."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from esper.cli.blueprint_tables import blueprints_table, lineage_tables, module_of, outcomes_table, table_of
from esper.config import Settings, load_settings
from esper.config.yaml_file import read_yaml
from esper.errors import ConfigError, ContractError, KernelError
from esper.kasmina.catalogue import CATALOGUE, cost_of
from esper.oona.cloudevents import explain
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import BlueprintChange, BlueprintStatus, LayerKind, Verdict
from esper.schemas.events import BlueprintChangeRequested
from esper.services.urza import library_queries
from esper.services.urza.blueprint_changes import ChangeOutcome, changes_of, request_changes
from esper.services.urza.kernels.shipped_blueprints import SHIPPED

SOURCE = "esper-blueprints"
EXIT_NOT_ACCEPTED = 1
PAGE = 500
TIMEOUT_S = 10.0  # of the projection; the change itself is in the log by then
POLL_S = 0.2

T = TypeVar("T")
Ids = Annotated[list[str], typer.Argument(help="The blueprints.", metavar="ID...")]
Reason = Annotated[str, typer.Option(help="Why; it is kept in the log.")]
Key = Annotated[str | None, typer.Option(help="Idempotency key: asking again with it changes nothing.")]
Changes = Callable[[Any], Awaitable[list[BlueprintChangeRequested]]]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    blueprints = typer.Typer(help="What can grow: costs, and the life of every blueprint.")
    blueprints.callback(invoke_without_command=True)(costs)
    blueprints.command("list")(show_all)
    blueprints.command("show")(show)
    blueprints.command()(propose)
    blueprints.command()(certify)
    blueprints.command()(reject)
    blueprints.command()(retire)
    app.add_typer(blueprints, name="blueprints")


def costs(
    context: typer.Context,
    features: int = typer.Option(64, min=1, help="The layer's output features (channels)."),
    kind: LayerKind = typer.Option(LayerKind.LINEAR, help="The kind of layer."),
    positions: int = typer.Option(
        1, min=1, help="Positions of one sample: vectors of a linear layer, length or height x width of a convolution."
    ),
) -> None:
    """Show the blueprints that Esper ships for a layer: parameters, and FLOPs of one forward pass of one sample."""
    if context.invoked_subcommand is not None:
        return
    title = f"{kind}, {features} features, {positions} position(s)"
    table = table_of(title, "blueprint", "s(h)", numbers=("parameters", "FLOPs", "widest / h"))
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
    console = Console()
    console.print(table)
    console.print("FLOPs: two for each multiply-add of a matrix product or convolution; docs/kernels.md has the rest.")


def show_all(
    status: Annotated[BlueprintStatus | None, typer.Option(help="Only those of this status.")] = None,
    waiting: Annotated[bool, typer.Option(help="Only those that wait to be examined, in their order.")] = False,
) -> None:
    """List blueprints as the log has them."""

    async def read(pool: Any) -> list[library_queries.Row]:
        async with pool.acquire() as connection:
            if waiting:
                return await library_queries.unvalidated(connection, limit=PAGE)
            return await library_queries.blueprints(connection, status=status, limit=PAGE)

    Console().print(blueprints_table(_read(read)))


def show(blueprint_id: Annotated[str, typer.Argument(help="The blueprint.", metavar="ID")]) -> None:
    """Show one blueprint: its changes, certificate, kernels, and where it grew."""

    async def read(pool: Any) -> library_queries.Lineage | None:
        async with pool.acquire() as connection:
            return await library_queries.lineage(connection, blueprint_id)

    found = _read(read)
    if found is None:
        raise ContractError(
            f"there is no blueprint {blueprint_id!r}: `esper blueprints list` names those that there are"
        )
    console, row = Console(), found.blueprint
    spec = row["spec"]
    console.print(f"[bold]{row['blueprint_id']}[/bold] is {row['status']} (version {row['version']})")
    console.print(f"{module_of(spec)} for {', '.join(spec['targets'])}; {escape(spec['description'])}")
    for table in lineage_tables(found):
        console.print(table)


def propose(
    file: Annotated[
        Path, typer.Argument(help="YAML or JSON: blueprint id -> module, parameters, targets, description.")
    ],
    reason: Reason = "",
    key: Key = None,
    wait: Annotated[bool, typer.Option(help="Wait until Urza has certified or rejected each of them.")] = False,
) -> None:
    """Propose blueprints; a running Urza examines them, and certifies or rejects each."""
    specs = read_specs(file)

    async def proposals(pool: Any) -> list[BlueprintChangeRequested]:
        known = {r["blueprint_id"]: r["version"] for r in await _versions(pool, list(specs))}
        return [
            BlueprintChangeRequested(
                blueprint_id=blueprint_id, change="propose", expected_version=known.get(blueprint_id, 0), spec=spec,
                reason=reason,
            )
            for blueprint_id, spec in specs.items()
        ]  # fmt: skip

    outcomes = _ask(proposals, key)
    if wait and all(o.verdict is Verdict.ACCEPTED for o in outcomes):
        rows = _read(lambda pool: _validated(pool, list(specs)))
        for row in rows:
            typer.echo(
                f"{row['blueprint_id']} is {row['status']}: `esper blueprints show {row['blueprint_id']}` says why"
            )
        if any(r["status"] == BlueprintStatus.REJECTED for r in rows):
            raise typer.Exit(EXIT_NOT_ACCEPTED)


def certify(ids: Ids, reason: Reason = "", key: Key = None) -> None:
    """Certify compiled blueprints by your own word: they have no certificate then."""
    _ask(lambda pool: changes_of(pool, BlueprintChange.CERTIFY, ids, reason), key)


def reject(ids: Ids, reason: Reason = "", key: Key = None) -> None:
    """Reject blueprints that are not certified yet."""
    _ask(lambda pool: changes_of(pool, BlueprintChange.REJECT, ids, reason), key)


def retire(ids: Ids, reason: Reason = "", key: Key = None) -> None:
    """Retire certified blueprints: Tamiyo chooses them no more; their kernels stay for the runs that have them."""
    _ask(lambda pool: changes_of(pool, BlueprintChange.RETIRE, ids, reason), key)


def read_specs(file: Path) -> dict[str, BlueprintSpec]:
    """The specs in a file.

    Raises:
        ConfigError: it is no file of specs; with the blueprint and what is wrong.
    """
    specs = {}
    for blueprint_id, value in read_yaml(file).values.items():
        try:
            specs[blueprint_id] = BlueprintSpec.model_validate(value)
            BlueprintChangeRequested(blueprint_id=blueprint_id, change="propose", expected_version=0, spec=value)
        except ValidationError as error:
            raise ConfigError(f"{file}: {blueprint_id}: {explain(error)}") from None
    if not specs:
        raise ConfigError(f"{file} proposes nothing: write a blueprint's id, and its module, targets and parameters")
    return specs


def _ask(changes: Changes, key: str | None) -> list[ChangeOutcome]:
    """Ask for changes and show their verdicts; exit code 1 unless all were accepted."""
    key = key or str(uuid.uuid4())

    async def ask(settings: Settings) -> list[ChangeOutcome]:
        from esper.oona.producer import OonaProducer
        from esper.streams.database.connections import connect_pool

        async with AsyncExitStack() as exits:
            pool = await exits.enter_async_context(connect_pool(settings.need_postgres()))
            wanted = await changes(pool)
            producer = await exits.enter_async_context(OonaProducer(settings.need_kafka(), client_id=SOURCE))
            return await request_changes(producer, pool, wanted, key=key, source=SOURCE, timeout_s=TIMEOUT_S)

    outcomes = asyncio.run(ask(load_settings()))
    late = f"in the log, not projected after {TIMEOUT_S:g} s: is a worker running?"
    Console().print(outcomes_table(outcomes, key, late))
    if any(o.verdict is not Verdict.ACCEPTED for o in outcomes):
        raise typer.Exit(EXIT_NOT_ACCEPTED)
    return outcomes


def _read(read: Callable[[Any], Awaitable[T]]) -> T:
    async def run(settings: Settings) -> T:
        from esper.streams.database.connections import connect_pool

        async with connect_pool(settings.need_postgres()) as pool:
            return await read(pool)

    return asyncio.run(run(load_settings()))


async def _versions(pool: Any, blueprint_ids: list[str]) -> list[library_queries.Row]:
    async with pool.acquire() as connection:
        return await library_queries.versions(connection, blueprint_ids)


async def _validated(pool: Any, blueprint_ids: list[str]) -> list[library_queries.Row]:
    while True:
        rows = await _versions(pool, blueprint_ids)
        if all(r["status"] not in (BlueprintStatus.PROPOSED, BlueprintStatus.COMPILED) for r in rows):
            return rows
        await asyncio.sleep(POLL_S)
