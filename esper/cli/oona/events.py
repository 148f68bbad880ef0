"""`esper events tail`: events as they come."""

import asyncio
from collections.abc import AsyncIterator

import typer

from esper.config import load_settings
from esper.errors import ConfigError, ContractError
from esper.oona.log_reader import StoredRecord, follow, partition_of, read_range
from esper.schemas.topics import TOPICS, TopicSpec, all_topics


def register(app: typer.Typer) -> None:
    """Add the commands."""
    events = typer.Typer(no_args_is_help=True, help="The events of Oona.")
    events.command()(tail)
    events.callback()(lambda: None)
    app.add_typer(events, name="events")


def tail(
    topic: str = typer.Argument(..., help="A topic; `esper topics list` names them."),
    run: str | None = typer.Option(None, help="Only this run's (or blueprint's) events."),
    from_beginning: bool = typer.Option(False, "--from-beginning", help="All there is, then stop."),
    number: int = typer.Option(0, "-n", help="Stop after so many events; 0 goes on."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object a line: position, envelope, value."),
) -> None:
    """Show events as they come, or all that are there."""
    asyncio.run(_tail(_topic(topic), run, from_beginning, number, as_json))


async def _tail(topic: TopicSpec, run: str | None, from_beginning: bool, number: int, as_json: bool) -> None:
    kafka, shown = load_settings().need_kafka(), 0
    partition = partition_of(run, topic) if run else None
    source: AsyncIterator[StoredRecord] = (
        read_range(kafka, topic, partition=partition) if from_beginning else follow(kafka, topic, partition=partition)
    )
    async for record in source:
        if run and record.key != run.encode():
            continue
        typer.echo(_as_json(record) if as_json else _as_line(record))
        shown += 1
        if number and shown >= number:
            return


def _topic(name: str) -> TopicSpec:
    for spec in all_topics():
        if spec.name == name:
            return spec
    raise ConfigError(f"there is no topic {name!r}; there are {', '.join(t.name for t in TOPICS)}")


def _as_line(record: StoredRecord) -> str:
    where = f"{record.position.partition:>2}@{record.position.offset:<7}"
    try:
        message = record.decode()
    except ContractError as error:
        return f"{where} unreadable: {error}"
    return f"{where} {message.time:%H:%M:%S.%f} {message.data.type} {message.data.model_dump_json()}"


def _as_json(record: StoredRecord) -> str:
    import json

    value = record.value.decode(errors="replace") if record.value is not None else None
    return json.dumps(
        {
            "topic": record.position.topic,
            "partition": record.position.partition,
            "offset": record.position.offset,
            "key": record.key.decode(errors="replace") if record.key else None,
            "headers": {n: None if t is None else t.decode(errors="replace") for n, t in record.headers},
            "value": value,
        }
    )
