"""`esper topics`: make them, look at them."""

import asyncio

import typer
from rich.console import Console
from rich.table import Table

from esper.config import load_settings
from esper.oona.admin.topics import TopicStatus, apply_topics, list_topics


def register(app: typer.Typer) -> None:
    """Add the commands."""
    topics = typer.Typer(no_args_is_help=True, help="The topics of Oona.")
    topics.command("apply")(apply)
    topics.command("list")(list_all)
    app.add_typer(topics, name="topics")


def apply() -> None:
    """Make the topics that are missing; change nothing that is there."""
    _show(asyncio.run(apply_topics(load_settings().need_kafka())))


def list_all() -> None:
    """Show every topic and how it stands."""
    _show(asyncio.run(list_topics(load_settings().need_kafka())))


def _show(statuses: list[TopicStatus]) -> None:
    table = Table("topic", "partitions", "kept", "state")
    for s in statuses:
        kept = "for ever" if s.spec.retention_ms < 0 else f"{s.spec.retention_ms / 3_600_000:g} h"
        table.add_row(s.spec.name, str(s.spec.num_partitions), kept, s.state)
    Console().print(table)
