"""`esper config show | check | docs`: what is set, whether it is right, and what can be set."""

import dataclasses
import json
from pathlib import Path

import typer

from esper.config import SECTIONS, load_settings
from esper.config.settings_reference import SettingRow, check_all, list_settings, markdown, named_sections

_FILE = typer.Option(None, "--config", help="A YAML file with settings; ESPER_CONFIG where it is not named.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    config = typer.Typer(no_args_is_help=True, help="The settings: what is set, and what can be.")
    config.command()(show)
    config.command()(check)
    config.command()(docs)
    app.add_typer(config, name="config")


def show(
    section: str | None = typer.Argument(None, help="One section; all where it is not named."),
    config: Path | None = _FILE,
    as_json: bool = typer.Option(False, "--json", help="For machines: a list of objects."),
) -> None:
    """Show every setting, its value, and who set it. Secrets are masked."""
    settings = load_settings(config)
    named = named_sections(settings)
    rows = list_settings(settings, (section,) if section else named)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    _print_aligned(rows)
    absent = [name for name in SECTIONS if section is None and name not in named]
    if absent:
        typer.echo(f"no source names: {', '.join(absent)}")


def check(file: Path = typer.Argument(..., help="The YAML file; this shell's variables count as well.")) -> None:
    """Check every section of a file, those of services too; what is wrong is told, with exit code 1."""
    check_all(load_settings(file))
    typer.echo(f"{file} is right")


def docs() -> None:
    """Print docs/configuration.md: every option, as the code has it."""
    typer.echo(markdown(), nl=False)


def _print_aligned(rows: list[SettingRow]) -> None:
    key_width = max(len(row.key) for row in rows)
    value_width = max(len(row.shown) for row in rows)
    for row in rows:
        typer.echo(f"{row.key:{key_width}}  {row.shown:{value_width}}  {row.origin}")
