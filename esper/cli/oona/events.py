"""`esper events tail`: prints events from a topic."""

import asyncio
import json
from contextlib import aclosing

import typer

from esper.cli.command_group import add_group
from esper.cli.oona.topics import topic_named
from esper.config import load_settings
from esper.errors import ContractError
from esper.oona.log_reader import StoredRecord, follow, partition_of, read_range
from esper.schemas.topics import TopicSpec, all_topics


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_group(app, "events", "Read events from Kafka.", {"tail": tail})


def tail(
    topic: str = typer.Argument(..., help="Topic name; see `esper topics list`."),
    run: str | None = typer.Option(None, help="Only events with this key: a run or blueprint id."),
    from_beginning: bool = typer.Option(False, "--from-beginning", help="Print all existing events, then stop."),
    max_events: int = typer.Option(
        0, "--max-events", "-n", help="Stop after this many events. [default: no limit]", show_default=False
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object a line: position, headers and value."),
) -> None:
    """Print new events as they arrive, or all existing events."""
    asyncio.run(_tail(topic_named(topic, all_topics()), run, from_beginning, max_events, as_json))


async def _tail(topic: TopicSpec, run: str | None, from_beginning: bool, max_events: int, as_json: bool) -> None:
    kafka, num_printed = load_settings().need_kafka(), 0
    partition = partition_of(run, topic) if run else None
    read = read_range if from_beginning else follow
    async with aclosing(read(kafka, topic, partition=partition)) as records:
        async for record in records:
            if run and record.key != run.encode():
                continue
            typer.echo(_format_json(record) if as_json else _format_line(record))
            num_printed += 1
            if max_events and num_printed >= max_events:
                return


def _format_line(record: StoredRecord) -> str:
    where = f"{record.position.partition:>2}@{record.position.offset:<7}"
    try:
        message = record.decode()
    except ContractError as error:
        return f"{where} cannot be decoded: {error}"
    return f"{where} {message.time:%H:%M:%S.%f} {message.data.type} {message.data.model_dump_json()}"


def _format_json(record: StoredRecord) -> str:
    return json.dumps(
        {
            "topic": record.position.topic,
            "partition": record.position.partition,
            "offset": record.position.offset,
            "key": record.key.decode(errors="replace") if record.key else None,
            "headers": {n: None if t is None else t.decode(errors="replace") for n, t in record.headers},
            "value": None if record.value is None else record.value.decode(errors="replace"),
        }
    )
