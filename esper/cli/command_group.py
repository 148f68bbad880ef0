"""Groups of commands, such as `esper topics list` and `esper topics apply`."""

from collections.abc import Callable, Mapping
from typing import Any

import typer

Commands = Mapping[str, Callable[..., Any]]
"""Name of a command within its group -> its function."""


def add_group(app: typer.Typer, name: str, help: str, commands: Commands) -> typer.Typer:
    """Add a group to the application and return it; ``help`` lists ``commands`` in their order."""
    group = typer.Typer(no_args_is_help=True, help=help)
    for command_name, command in commands.items():
        group.command(command_name)(command)
    app.add_typer(group, name=name)
    return group
