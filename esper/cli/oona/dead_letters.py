"""`esper dlq list | show | redrive`: the records that nobody could read."""

import asyncio
import uuid
from collections import Counter
from itertools import groupby

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper.config import KafkaSettings, load_settings
from esper.errors import ConfigError, NotAllowedError
from esper.oona.dead_letters.dead_letter import DeadLetter
from esper.oona.dead_letters.redrive import (
    Where,
    already_redriven,
    describe,
    find_letters,
    is_redriven,
    redrive,
    why_unreadable,
)
from esper.oona.producer import OonaProducer
from esper.oona.records import Position
from esper.schemas.topics import TOPICS, TopicSpec

MAX_SHOWN_BYTES = 4_000
MAX_REASON_CHARS = 2_000
EXIT_REFUSED = 1

_WHERE = typer.Option(
    [],
    "--where",
    help="FIELD=TEXT or FIELD~PART; several must all hold. Fields: topic, partition, "
    "offset, reason, error, type, key, source.",
)
_TOPIC = typer.Option(None, "--topic", help="Only this topic's letters.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    dlq = typer.Typer(no_args_is_help=True, help="Dead letters: the records that nobody could read.")
    dlq.command("list")(list_letters)
    dlq.command()(show)
    dlq.command("redrive")(redrive_letters)
    app.add_typer(dlq, name="dlq")


def list_letters(
    topic: str | None = _TOPIC,
    where: list[str] = _WHERE,
    number: int = typer.Option(50, "-n", min=0, help="Show at most so many; the counts are of all."),
) -> None:
    """List dead letters with their reasons, and whether they were sent again."""
    letters, redriven = asyncio.run(_found(load_settings().need_kafka(), topic, where))
    console = Console()
    if not letters:
        console.print("no dead letters")
        return
    table = Table()
    for column in ("topic", "place", "type", "key", "reason", "tries", ""):
        table.add_column(column, overflow="fold")
    for letter in letters[:number]:
        seen, place = describe(letter), f"{letter.position.partition}@{letter.position.offset}"
        state = "redriven" if is_redriven(letter, redriven) else ""
        cells = (seen["topic"], place, seen["type"], seen["key"], letter.reason, str(letter.attempts), state)
        table.add_row(*map(escape, cells))
    console.print(table)
    reasons = Counter((letter.origin.topic, letter.reason) for letter in letters)
    for (name, reason), count in sorted(reasons.items()):
        console.print(f"{count:>8,} {name}: {reason}", highlight=False)
    console.print("`esper dlq show TOPIC PLACE` shows one, `esper dlq redrive` sends them again")


def show(
    topic: str = typer.Argument(..., help="The topic that the record was meant for."),
    place: str = typer.Argument(..., help="PARTITION@OFFSET of the letter, as `esper dlq list` has it."),
) -> None:
    """Show one dead letter whole: why, whence, headers, value."""
    partition, sign, offset = place.partition("@")
    if not (sign and partition.isdecimal() and offset.isdecimal()):
        raise ConfigError(f"{place!r} is no place: write PARTITION@OFFSET, e.g. 3@17")
    letters, redriven = asyncio.run(_found(load_settings().need_kafka(), topic, []))
    wanted = (int(partition), int(offset))
    letter = next((x for x in letters if (x.position.partition, x.position.offset) == wanted), None)
    if letter is None:
        raise ConfigError(f"{topic} has no dead letter at {place}; `esper dlq list --topic {topic}` has them all")
    origin = letter.origin
    typer.echo(f"origin    {origin.topic}[{origin.partition}] offset {origin.offset}")
    if letter.first_origin != origin:
        typer.echo(f"first at  offset {letter.first_origin.offset}, redriven since")
    typer.echo(f"reason    {letter.reason}: {letter.detail}")
    typer.echo(f"error     {letter.error}, attempt {letter.attempts}, at {letter.at}")
    typer.echo(f"now       {why_unreadable(letter) or 'this program can read it: redrive it'}")
    typer.echo(f"redriven  {'yes' if is_redriven(letter, redriven) else 'no'}")
    typer.echo(f"key       {letter.record.key!r}")
    for name, text in letter.record.headers:
        typer.echo(f"header    {name}: {text!r}")
    typer.echo(f"value     {_shown(letter.record.value)}")
    typer.echo(letter.trace.rstrip())


def redrive_letters(
    topic: str | None = _TOPIC,
    where: list[str] = _WHERE,
    reason: str = typer.Option("redriven by hand", help="Kept with the events that tell of it."),
    limit: int = typer.Option(1_000, min=1, help="Send at most so many."),
    again: bool = typer.Option(False, "--again", help="Also those that were redriven before."),
    unreadable: bool = typer.Option(False, "--unreadable", help="Also those that this program still cannot read."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would be sent."),
) -> None:
    """Send dead letters again to the topics that they were meant for. Each event is folded once, however often sent."""
    if not 0 < len(reason) <= MAX_REASON_CHARS:
        raise ConfigError(f"--reason has {len(reason):,} characters: write 1 to {MAX_REASON_CHARS:,}")
    kafka, console = load_settings().need_kafka(), Console()
    letters, redriven = asyncio.run(_found(kafka, topic, where))
    fresh = [x for x in letters if again or not is_redriven(x, redriven)]
    problems = {x.position: "" if unreadable else why_unreadable(x) for x in fresh}
    readable = [x for x in fresh if not problems[x.position]]
    chosen = readable[:limit]
    console.print(
        f"{len(letters):,} letters meet the conditions; {len(letters) - len(fresh):,} were redriven before, "
        f"{len(fresh) - len(readable):,} still cannot be read, {len(readable) - len(chosen):,} are over the limit"
    )
    for letter in [x for x in fresh if problems[x.position]][:3]:
        where_it_is = f"{letter.origin.topic}[{letter.origin.partition}] offset {letter.origin.offset}"
        console.print(f"  left: {where_it_is}: {escape(problems[letter.position])}", highlight=False)
    if dry_run or not chosen:
        console.print(f"{len(chosen):,} would be sent" if dry_run else "nothing to send")
        return
    sent, refused = asyncio.run(_redrive(kafka, chosen, reason))
    console.print(f"{sent:,} sent again, and told of on system.redrives")
    for name, why in refused.items():
        console.print(f"[red]none of {name}[/red]: {escape(why)}", highlight=False)
    if refused:
        raise typer.Exit(EXIT_REFUSED)


async def _redrive(kafka: KafkaSettings, letters: list[DeadLetter], reason: str) -> tuple[int, dict[str, str]]:
    """Topic by topic, since this user may be let write to one and not to another: how many, and what was refused."""
    redrive_id, sent, refused = uuid.uuid4(), 0, dict[str, str]()
    async with OonaProducer(kafka, client_id="esper-dlq") as producer:
        for topic, group in groupby(letters, key=lambda x: x.first_origin.topic):
            of_topic = list(group)
            try:
                await redrive(producer, of_topic, redrive_id, reason)
                sent += len(of_topic)
            except NotAllowedError as error:
                refused[topic] = str(error)
    return sent, refused


async def _found(
    kafka: KafkaSettings, topic: str | None, where: list[str]
) -> tuple[list[DeadLetter], frozenset[Position]]:
    conditions = [Where.parse(w) for w in where]
    letters = [x async for x in find_letters(kafka, _topics(topic), conditions)]
    return letters, await already_redriven(kafka)


def _topics(name: str | None) -> tuple[TopicSpec, ...]:
    chosen = tuple(t for t in TOPICS if name is None or t.name == name.removesuffix(".dlq"))
    if not chosen:
        raise ConfigError(f"there is no topic {name!r}; there are {', '.join(t.name for t in TOPICS)}")
    return chosen


def _shown(value: bytes | None) -> str:
    if value is None:
        return "none"
    more = f" ... ({len(value):,} bytes)" if len(value) > MAX_SHOWN_BYTES else ""
    return value[:MAX_SHOWN_BYTES].decode(errors="backslashreplace") + more
