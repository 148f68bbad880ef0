"""`esper dlq list | show | redrive`: records that could not be decoded."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import typer
from rich.markup import escape

from esper.cli.command_group import Commands, add_group
from esper.cli.oona.topics import topic_named
from esper.cli.terminal import EXIT_ERROR, new_table, print_line, print_table
from esper.config import KafkaSettings, load_settings
from esper.errors import ConfigError, NotAllowedError
from esper.oona.dead_letters.dead_letter import DeadLetter
from esper.oona.dead_letters.redrive import (
    Condition,
    decode_problem,
    field_values,
    find_dead_letters,
    find_redriven,
    is_redriven,
    redrive,
)
from esper.oona.producer import OonaProducer
from esper.oona.records import Position
from esper.schemas.topics import TOPICS, TopicSpec

MAX_SHOWN_BYTES = 4_000
MAX_REASON_CHARS = 2_000
MAX_EXAMPLES = 3

_WHERE = typer.Option(
    [],
    "--where",
    help="Condition FIELD=TEXT or FIELD~SUBSTRING. Repeatable; all must hold. Fields: topic, partition, offset, "
    "reason, error, type, key, source.",
)
_TOPIC = typer.Option(None, "--topic", help="Only dead letters of this topic.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands: Commands = {"list": list_dead_letters, "show": show, "redrive": redrive_dead_letters}
    about = "List, inspect and redrive dead letters: records that could not be decoded."
    add_group(app, "dlq", about, commands)


def list_dead_letters(
    topic: str | None = _TOPIC,
    where: list[str] = _WHERE,
    limit: int = typer.Option(50, "--limit", "-n", min=0, help="Rows to print; the totals count all dead letters."),
) -> None:
    """List dead letters with the reason, and whether they were redriven."""
    dead_letters, redriven = asyncio.run(_find(load_settings().need_kafka(), topic, where))
    if not dead_letters:
        print_line("no dead letters")
        return
    table = new_table("topic", "position", "type", "key", "reason", "attempts", "state")
    for dead_letter in dead_letters[:limit]:
        fields, position = field_values(dead_letter), dead_letter.position
        state = "redriven" if is_redriven(dead_letter, redriven) else ""
        cells = (fields["topic"], f"{position.partition}@{position.offset}", fields["type"], fields["key"])
        table.add_row(*map(escape, (*cells, dead_letter.reason, str(dead_letter.attempts), state)))
    print_table(table)
    reasons = Counter((dead_letter.origin.topic, dead_letter.reason) for dead_letter in dead_letters)
    for (name, reason), count in sorted(reasons.items()):
        print_line(f"{count:>8,} {name}: {reason}")
    print_line("`esper dlq show TOPIC POSITION` shows one, `esper dlq redrive` sends them to their topics again")


def show(
    topic: str = typer.Argument(..., help="Topic of the record that could not be decoded."),
    position: str = typer.Argument(..., help="PARTITION@OFFSET of the dead letter, as `esper dlq list` prints it."),
) -> None:
    """Show one dead letter: origin, reason, headers, value and stack trace."""
    partition, separator, offset = position.partition("@")
    if not (separator and partition.isdecimal() and offset.isdecimal()):
        raise ConfigError(f"{position!r} is not a position; write PARTITION@OFFSET, e.g. 3@17")
    dead_letters, redriven = asyncio.run(_find(load_settings().need_kafka(), topic, []))
    wanted = (int(partition), int(offset))
    found = next((d for d in dead_letters if (d.position.partition, d.position.offset) == wanted), None)
    if found is None:
        raise ConfigError(f"{topic} has no dead letter at {position}; `esper dlq list --topic {topic}` lists all")
    typer.echo(f"origin    {_format_position(found.origin)}")
    if found.first_origin != found.origin:
        typer.echo(f"first at  offset {found.first_origin.offset}, redriven since")
    typer.echo(f"reason    {found.reason}: {found.detail}")
    typer.echo(f"error     {found.error}, attempt {found.attempts}, at {found.at}")
    typer.echo(f"now       {decode_problem(found) or 'this version can decode it: redrive it'}")
    typer.echo(f"redriven  {'yes' if is_redriven(found, redriven) else 'no'}")
    typer.echo(f"key       {found.record.key!r}")
    for name, text in found.record.headers:
        typer.echo(f"header    {name}: {text!r}")
    typer.echo(f"value     {_format_value(found.record.value)}")
    typer.echo(found.trace.rstrip())


def redrive_dead_letters(
    topic: str | None = _TOPIC,
    where: list[str] = _WHERE,
    reason: str = typer.Option("redriven by hand", help="Reason; recorded on system.redrives."),
    limit: int = typer.Option(1_000, min=1, help="Redrive at most this many."),
    again: bool = typer.Option(False, "--again", help="Include dead letters that were already redriven."),
    undecodable: bool = typer.Option(False, "--undecodable", help="Include records that still cannot be decoded."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print what would be sent, and send nothing."),
) -> None:
    """Send dead letters to their topics again. Consumers process each event once, however often it is sent."""
    if not 0 < len(reason) <= MAX_REASON_CHARS:
        raise ConfigError(f"--reason has {len(reason):,} characters; write 1 to {MAX_REASON_CHARS:,}")
    kafka = load_settings().need_kafka()
    dead_letters, redriven = asyncio.run(_find(kafka, topic, where))
    candidates = [d for d in dead_letters if again or not is_redriven(d, redriven)]
    problems = [(d, "" if undecodable else decode_problem(d)) for d in candidates]
    broken = [(d, problem) for d, problem in problems if problem]
    decodable = [d for d, problem in problems if not problem]
    chosen = decodable[:limit]
    print_line(
        f"{len(dead_letters):,} dead letters match: {len(dead_letters) - len(candidates):,} already redriven, "
        f"{len(broken):,} still cannot be decoded, {len(decodable) - len(chosen):,} over the limit"
    )
    for dead_letter, problem in broken[:MAX_EXAMPLES]:
        print_line(f"  skipped {_format_position(dead_letter.origin)}: {escape(problem)}")
    if dry_run or not chosen:
        print_line(f"{len(chosen):,} would be redriven" if dry_run else "nothing to redrive")
        return
    num_sent, refused = asyncio.run(_redrive(kafka, chosen, reason))
    print_line(f"{num_sent:,} redriven, recorded on system.redrives")
    for name, error in refused.items():
        print_line(f"[red]none of {name}[/red]: {escape(error)}")
    if refused:
        raise typer.Exit(EXIT_ERROR)


async def _redrive(kafka: KafkaSettings, dead_letters: list[DeadLetter], reason: str) -> tuple[int, dict[str, str]]:
    """Redrive topic by topic, since the user may lack the right to write to some.

    Returns:
        The number of records sent, and the error of each topic that was refused.
    """
    redrive_id, num_sent, refused = uuid.uuid4(), 0, dict[str, str]()
    async with OonaProducer(kafka, client_id="esper-dlq") as producer:
        for topic, group in groupby(dead_letters, key=lambda d: d.first_origin.topic):
            of_topic = list(group)
            try:
                await redrive(producer, of_topic, redrive_id, reason)
                num_sent += len(of_topic)
            except NotAllowedError as error:
                refused[topic] = str(error)
    return num_sent, refused


async def _find(
    kafka: KafkaSettings, topic: str | None, where: list[str]
) -> tuple[list[DeadLetter], frozenset[Position]]:
    """Dead letters that meet the conditions, and the positions of all that were redriven."""
    topics: Sequence[TopicSpec] = TOPICS if topic is None else [topic_named(topic.removesuffix(".dlq"))]
    conditions = [Condition.parse(w) for w in where]
    return [d async for d in find_dead_letters(kafka, topics, conditions)], await find_redriven(kafka)


def _format_position(position: Position) -> str:
    return f"{position.topic}[{position.partition}] offset {position.offset}"


def _format_value(value: bytes | None) -> str:
    if value is None:
        return "none"
    more = f" ... ({len(value):,} bytes)" if len(value) > MAX_SHOWN_BYTES else ""
    return value[:MAX_SHOWN_BYTES].decode(errors="backslashreplace") + more
