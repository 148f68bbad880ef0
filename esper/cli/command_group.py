"""Groups of commands, such as `esper topics list` and `esper topics apply`."""

from collections.abc import Callable, Mapping
from typing import Any

import typer

Commands = Mapping[str, Callable[..., Any]]
"""Functions by the word that follows the name of their group."""


def add_group(app: typer.Typer, name: str, about: str, commands: Commands) -> typer.Typer:
    """Add a group to the application and return it.

    Args:
        about: help text of the group.
        commands: in the order of the help text.
    """
    group = typer.Typer(no_args_is_help=True, help=about)
    for word, command in commands.items():
        group.command(word)(command)
    app.add_typer(group, name=name)
    return group
