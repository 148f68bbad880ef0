"""`esper schema`: publish the contracts, say what a change breaks, release them, validate real records."""

import asyncio
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import typer
import yaml
from rich.console import Console
from rich.table import Table

from esper.cli.schema_conformance import validate_lines, validate_log
from esper.config import load_settings
from esper.errors import ConfigError, ContractError
from esper.schemas.registry import REGISTRY
from esper.schemas.specs.asyncapi import document
from esper.schemas.specs.compatibility import Finding, check
from esper.schemas.specs.contract_set import (
    FOLDER,
    PUBLISHED,
    contracts_of,
    files_of,
    read_released,
    with_released,
    write_released,
)
from esper.schemas.topics import TOPICS, TopicSpec

ASYNCAPI_FILE = FOLDER / "asyncapi.yaml"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    schema = typer.Typer(no_args_is_help=True, help="The published contracts.")
    schema.command()(write)
    schema.command("check")(check_released)
    schema.command()(release)
    schema.command()(validate)
    app.add_typer(schema, name="schema")


def published() -> dict[Path, str]:
    """Every published file and its text, as the models are: one a type, old versions too, and AsyncAPI."""
    contracts = with_released(contracts_of(), read_released())
    files = {PUBLISHED / name: text for name, text in files_of(contracts).items()}
    header = "# Made by `esper schema write` from the registry; do not edit.\n"
    body = yaml.safe_dump(document(version("esper")), sort_keys=False, allow_unicode=True, width=110)
    return {**files, ASYNCAPI_FILE: header + body}


def write() -> None:
    """Write schemas/json and schemas/asyncapi.yaml from the models."""
    files = published()
    PUBLISHED.mkdir(exist_ok=True)
    for stale in set(PUBLISHED.glob("*.json")) - files.keys():
        stale.unlink()
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    typer.echo(f"{len(files)} files written: {PUBLISHED.name}/*.json and {ASYNCAPI_FILE.name}")


def check_released() -> None:
    """Compare the models with the released contracts: what breaks, for whom, and why. Exit 1 if anything does."""
    findings = check(read_released(), contracts_of(), REGISTRY.upcasters)
    print_findings(findings)
    num_breaks = sum(f.is_break for f in findings)
    if num_breaks:
        raise ContractError(f"{num_breaks} breaking change(s) against the released contracts")
    typer.echo("Nothing is broken.")


def release() -> None:
    """Make the contracts as they are now the released ones; refused where they break the released ones."""
    check_released()
    contracts = with_released(contracts_of(), read_released())
    write_released(contracts)
    write()
    typer.echo(f"Released: {len(contracts.types)} event types, {len(contracts.topics)} topics.")


def validate(
    file: typer.FileText | None = typer.Argument(None, help="Lines of `esper events tail --json`; - for stdin."),
    topic: list[str] = typer.Option([], help="Read the broker's log instead: this topic; may be repeated."),
    log: bool = typer.Option(False, "--log", help="Read the broker's log instead: every topic."),
    run: str | None = typer.Option(None, help="Of the log, only this run's (or blueprint's, or policy's) records."),
) -> None:
    """Validate records against the published schemas with the jsonschema library. Exit 1 if one does not conform."""
    if (file is None) != (bool(topic) or log):
        raise ConfigError("name a file, or a --topic, or --log")
    if file is not None:
        tally = validate_lines(file)
    else:
        tally = asyncio.run(validate_log(load_settings().need_kafka(), _topics(topic), key=run))
    table = Table("event type", "valid records")
    for event_type, number in sorted(tally.num_valid.items()):
        table.add_row(event_type, f"{number:,}")
    Console().print(table)
    tally.raise_if_broken()


def print_findings(findings: Iterable[Finding]) -> None:
    """A block for each break: what changed where, whom it breaks, why, and what to do. A line for each note."""
    for f in findings:
        where = f"{f.subject} {f.path}".strip()
        if f.is_break:
            typer.echo(f"BREAKS {where}: {f.what}\n    whom: {f.who}\n    why:  {f.why}\n    do:   {f.remedy}")
        else:
            typer.echo(f"note   {where}: {f.what}; {f.why}: {f.remedy}")


def _topics(names: list[str]) -> list[TopicSpec]:
    known = {spec.name: spec for spec in TOPICS}
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no topic {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(TOPICS)
