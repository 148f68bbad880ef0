"""`esper schema`: write the contracts, check them against the released ones, release them, validate records."""

import asyncio
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import typer
import yaml

from esper.cli.command_group import Commands, add_group
from esper.cli.oona.topics import topic_named
from esper.cli.schema_conformance import validate_lines, validate_log
from esper.cli.terminal import new_table, print_table
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
from esper.schemas.topics import TOPICS

ASYNCAPI_FILE = FOLDER / "asyncapi.yaml"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands: Commands = {"write": write, "check": check_released, "release": release, "validate": validate}
    add_group(app, "schema", "Write, check and release the contracts of events and topics.", commands)


def published() -> dict[Path, str]:
    """Text of every published file: a JSON Schema for each version of each event type, and the AsyncAPI document."""
    contracts = with_released(contracts_of(), read_released())
    files = {PUBLISHED / name: text for name, text in files_of(contracts).items()}
    header = "# Made by `esper schema write` from the registry; do not edit.\n"
    body = yaml.safe_dump(document(version("esper")), sort_keys=False, allow_unicode=True, width=110)
    return {**files, ASYNCAPI_FILE: header + body}


def write() -> None:
    """Write JSON Schemas and the AsyncAPI document from the models."""
    files = published()
    PUBLISHED.mkdir(exist_ok=True)
    for stale in set(PUBLISHED.glob("*.json")) - files.keys():
        stale.unlink()
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {len(files)} files: {PUBLISHED.name}/*.json and {ASYNCAPI_FILE.name}")


def check_released() -> None:
    """Compare the models with the released contracts. Exits with 1 if a change breaks a reader or a writer."""
    findings = check(read_released(), contracts_of(), REGISTRY.upcasters)
    print_findings(findings)
    num_breaks = sum(f.is_break for f in findings)
    if num_breaks:
        raise ContractError(f"{num_breaks} breaking change(s) against the released contracts; the list says what to do")
    typer.echo("no breaking changes")


def release() -> None:
    """Release the contracts as they are now. Fails if a change breaks the released ones."""
    check_released()
    contracts = with_released(contracts_of(), read_released())
    write_released(contracts)
    write()
    typer.echo(f"released {len(contracts.types)} event types and {len(contracts.topics)} topics")


def validate(
    file: typer.FileText | None = typer.Argument(
        None, help="File with lines of `esper events tail --json`, or - for stdin."
    ),
    topic: list[str] = typer.Option([], help="Validate this topic of the log instead. Repeatable."),
    log: bool = typer.Option(False, "--log", help="Validate every topic of the log instead."),
    run: str | None = typer.Option(None, help="Only records with this key: a run, blueprint or policy id."),
) -> None:
    """Validate records against the published JSON Schemas. Exits with 1 if a record does not conform."""
    if (file is None) != (bool(topic) or log):
        raise ConfigError("nothing to validate, or more than one source; give a file, or --topic, or --log")
    if file is not None:
        tally = validate_lines(file)
    else:
        tally = asyncio.run(
            validate_log(load_settings().need_kafka(), list(map(topic_named, topic)) or TOPICS, key=run)
        )
    rows = [(event_type, f"{number:,}") for event_type, number in sorted(tally.num_valid.items())]
    print_table(new_table("event type", numbers=("valid records",), rows=rows))
    tally.raise_if_broken()


def print_findings(findings: Iterable[Finding]) -> None:
    """Print a block for each breaking change (what, whom it breaks, why, remedy) and a line for each note."""
    for f in findings:
        where = f"{f.subject} {f.path}".strip()
        if f.is_break:
            typer.echo(
                f"BREAKS {where}: {f.what}\n    affects: {f.affected}\n    why:     {f.why}\n    remedy:  {f.remedy}"
            )
        else:
            typer.echo(f"note   {where}: {f.what}; {f.why}: {f.remedy}")
