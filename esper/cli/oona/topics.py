"""`esper topics apply | list`: the topics of Oona on the broker."""

import asyncio
from collections.abc import Iterable

import typer

from esper.cli.command_group import add_group
from esper.cli.terminal import new_table, print_table
from esper.config import load_settings
from esper.errors import ConfigError
from esper.oona.admin.topics import TopicStatus, apply_topics
from esper.oona.admin.topics import list_topics as list_statuses
from esper.schemas.topics import TOPICS, TopicSpec


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_group(app, "topics", "Create and list Kafka topics.", {"apply": apply, "list": list_topics})


def apply() -> None:
    """Create missing topics. Existing topics are not changed."""
    _print_statuses(asyncio.run(apply_topics(load_settings().need_kafka())))


def list_topics() -> None:
    """List every topic with its partitions, retention and state."""
    _print_statuses(asyncio.run(list_statuses(load_settings().need_kafka())))


def topic_named(name: str, topics: Iterable[TopicSpec] = TOPICS) -> TopicSpec:
    """The topic with this name.

    Raises:
        ConfigError: ``topics`` has no such topic.
    """
    for spec in topics:
        if spec.name == name:
            return spec
    raise ConfigError(f"topic {name!r} does not exist; choose one of {', '.join(t.name for t in TOPICS)}")


def _print_statuses(statuses: list[TopicStatus]) -> None:
    rows = [(s.spec.name, str(s.spec.num_partitions), _format_retention(s.spec), s.state) for s in statuses]
    print_table(new_table("topic", "partitions", "retention", "state", rows=rows))


def _format_retention(spec: TopicSpec) -> str:
    return "unlimited" if spec.retention_ms < 0 else f"{spec.retention_ms / 3_600_000:g} h"
