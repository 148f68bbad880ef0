"""The words that docs/glossary.md bans are in no file and in no help text."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.banned_words import ROOT, files, occurrences
from typer.main import get_command

from esper.cli.app import app


def contexts(command: Any, parent: Any = None) -> Iterator[Any]:
    """Context of a command and of every command below it."""
    context = command.context_class(command, info_name=command.name, parent=parent)
    yield context
    for subcommand in getattr(command, "commands", {}).values():
        yield from contexts(subcommand, context)


CONTEXTS = {context.command_path: context for context in contexts(get_command(app))}


def test_files_have_no_banned_words() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in files()
        for number, word in occurrences(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_command_is_found() -> None:
    assert {"esper demo", "esper topics list", "esper tamiyo retrain"} <= CONTEXTS.keys()


@pytest.mark.parametrize("path", CONTEXTS)
def test_help_has_no_banned_words(path: str) -> None:
    context = CONTEXTS[path]
    text = context.command.get_help(context)
    assert context.command.help, "describe the command"
    assert [word for _number, word in occurrences(text)] == [], text
