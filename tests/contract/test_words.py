"""The words that docs/glossary.md bans are in no file and in no help text."""

from collections.abc import Iterator

import click
import pytest
from support.banned_words import ROOT, files, occurrences
from typer.main import get_command

from esper.cli.app import app


def commands(group: click.Group, name: str = "esper") -> Iterator[tuple[str, click.Context]]:
    """Path and context of every command below a group, and of the group itself."""
    yield name, click.Context(group, info_name=name)
    for word, command in group.commands.items():
        path = f"{name} {word}"
        if isinstance(command, click.Group):
            yield from commands(command, path)
        else:
            yield path, click.Context(command, info_name=path)


COMMANDS = dict(commands(get_command(app)))  # type: ignore[arg-type]


def test_files_have_no_banned_words() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in files()
        for number, word in occurrences(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("path", COMMANDS)
def test_help_has_no_banned_words(path: str) -> None:
    context = COMMANDS[path]
    text = context.command.get_help(context)
    assert context.command.help
    assert [f"{word}: {text}" for _number, word in occurrences(text)] == []
