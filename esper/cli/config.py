"""`esper config show | check | docs`: values of settings, validation of a file, reference of all settings."""

import dataclasses
from pathlib import Path

import typer

from esper.cli.command_group import add_group
from esper.cli.terminal import print_json
from esper.config import SECTIONS, load_settings
from esper.config.settings_reference import SettingRow, check_all, configured_sections, list_settings, markdown

_FILE = typer.Option(None, "--config", help="YAML file with settings. [default: $ESPER_CONFIG]")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_group(app, "config", "Show, check and document settings.", {"show": show, "check": check, "docs": docs})


def show(
    section: str | None = typer.Argument(None, help="Section to show. [default: all sections]"),
    config: Path | None = _FILE,
    as_json: bool = typer.Option(False, "--json", help="Print JSON: a list of objects."),
) -> None:
    """Show every setting with its value and where the value comes from. Secrets are masked."""
    settings = load_settings(config)
    named = configured_sections(settings)
    rows = list_settings(settings, (section,) if section else named)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    _print_aligned(rows)
    absent = [name for name in SECTIONS if section is None and name not in named]
    if absent:
        typer.echo(f"not configured: {', '.join(absent)}")


def check(
    file: Path = typer.Argument(..., help="YAML file. Environment variables are checked, too."),
) -> None:
    """Check every section of a file, including those of services. Exits with 1 if a setting is invalid."""
    check_all(load_settings(file))
    typer.echo(f"{file} is valid")


def docs() -> None:
    """Print the reference of all settings in Markdown, as in the documentation."""
    typer.echo(markdown(), nl=False)


def _print_aligned(rows: list[SettingRow]) -> None:
    key_width = max(len(row.key) for row in rows)
    value_width = max(len(row.shown) for row in rows)
    for row in rows:
        typer.echo(f"{row.key:{key_width}}  {row.shown:{value_width}}  {row.origin}")
