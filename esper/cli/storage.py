"""`esper storage list | get | verify | gc`: the blobs in S3, and whether they are what the log says."""

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from esper.config import Settings, load_settings
from esper.errors import ConfigError, MissingBlobError
from esper.storage.blob_keys import SHA256, BlobKind, StoredBlob
from esper.storage.blobs import BlobStore
from esper.storage.garbage_collection import Collected, collect
from esper.storage.inventory import Finding, Inspection, inspect, stored_blobs
from esper.storage.uploads import abort_upload
from esper.streams.blob_collection import DEFAULT_GRACE, CollectionPlan, planned_collection
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.blob_references import referenced_blobs

EXIT_DAMAGED = 1
MAX_SHOWN = 50
MAX_GET_BYTES = 1 << 40
MIN_PREFIX = 6

_JSON = typer.Option(False, "--json", help="Print JSON, for machines.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    storage = typer.Typer(no_args_is_help=True, help="The blobs in S3: kernels and checkpoints.")
    storage.command("list")(list_blobs)
    storage.command("get")(get_blob)
    storage.command()(verify)
    storage.command()(gc)
    app.add_typer(storage, name="storage")


def list_blobs(
    kind: BlobKind | None = typer.Option(None, help="Only these."),
    number: int = typer.Option(MAX_SHOWN, "-n", min=0, help="Show at most so many; the sum is of all."),
    as_json: bool = _JSON,
) -> None:
    """List the blobs, the newest first."""
    found = sorted(asyncio.run(_stored(load_settings())), key=lambda b: (b.modified_at, b.digest), reverse=True)
    chosen = [b for b in found if kind is None or b.kind is kind]
    if as_json:
        _print_json([_shown(b) for b in chosen])
        return
    console, table = Console(), Table("kind", "sha256", "bytes", "stored at")
    for blob in chosen[:number]:
        table.add_row(blob.kind, blob.digest, f"{blob.size_bytes:,}", f"{blob.modified_at:%Y-%m-%d %H:%M:%S}")
    console.print(table)
    console.print(f"{len(chosen):,} blobs, {sum(b.size_bytes for b in chosen):,} bytes", highlight=False)


def get_blob(
    digest: str = typer.Argument(..., help=f"The blob's SHA-256, or its first {MIN_PREFIX} digits or more."),
    output: Path | None = typer.Option(None, "-o", "--output", help="Where to write it; <SHA-256> here by default."),
) -> None:
    """Fetch a blob, verified, into a file."""
    if not SHA256.fullmatch(digest.ljust(64, "0")) or len(digest) < MIN_PREFIX:
        raise ConfigError(f"{digest!r} is no SHA-256: write {MIN_PREFIX} to 64 hexadecimal digits, in lower case")
    blob, path = asyncio.run(_get(load_settings(), digest, output))
    typer.echo(f"{path}: {blob.size_bytes:,} bytes, verified ({blob.kind}/{blob.digest})")


def verify(
    sample: float = typer.Option(
        1.0, min=0.0, max=1.0, help="Read this share of the blobs through; all are looked for."
    ),
    seed: int | None = typer.Option(None, help="Which ones a sample takes; another choice each time by default."),
    as_json: bool = _JSON,
) -> None:
    """See that every blob that the projections name is there with its bytes. Exit code 1 where one is not."""
    found = asyncio.run(_inspect(load_settings(), sample, random.Random(seed)))
    if as_json:
        _print_json({**_told(found), "is_whole": found.is_whole})
    else:
        _show_inspection(Console(), found)
    if not found.is_whole:
        raise typer.Exit(EXIT_DAMAGED)


def gc(
    delete: bool = typer.Option(False, "--delete", help="Delete; without it, only say what would be."),
    grace_h: float = typer.Option(
        DEFAULT_GRACE / timedelta(hours=1), "--grace-h", help="Keep what was stored within so many hours."
    ),
    as_json: bool = _JSON,
) -> None:
    """Delete the blobs that nothing names any more, and what dead uploads left."""
    plan, done = asyncio.run(_collect(load_settings(), delete, timedelta(hours=grace_h)))
    if as_json:
        _print_json(_told_collection(plan, done))
    else:
        _show_collection(Console(), plan, done)


async def _stored(settings: Settings) -> list[StoredBlob]:
    async with BlobStore(settings.need_s3()) as blobs:
        return list((await stored_blobs(blobs)).values())


async def _get(settings: Settings, prefix: str, output: Path | None) -> tuple[StoredBlob, Path]:
    async with BlobStore(settings.need_s3()) as blobs:
        found = [b for b in (await stored_blobs(blobs)).values() if b.digest.startswith(prefix)]
        if not found:
            raise MissingBlobError(f"no blob begins with {prefix}; `esper storage list` shows them")
        if len({b.digest for b in found}) > 1:
            raise ConfigError(f"{len(found)} blobs begin with {prefix}: write more of it")
        blob = found[0]
        path = output or Path(blob.digest)
        if path.is_dir():
            path = path / blob.digest
        await blobs.get_file(blob.digest, path, max_bytes=MAX_GET_BYTES, kind=blob.kind)
        return blob, path


async def _inspect(settings: Settings, share: float, rng: random.Random) -> Inspection:
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        references = await referenced_blobs(connection)
    with _bar("reading") as show:
        async with BlobStore(settings.need_s3()) as blobs:
            return await inspect(blobs, references, share=share, rng=rng, progress=show)


async def _collect(settings: Settings, delete: bool, grace: timedelta) -> tuple[CollectionPlan, Collected | None]:
    async with BlobStore(settings.need_s3()) as blobs, planned_collection(settings, blobs, grace) as plan:
        if not delete:
            return plan, None
        with _bar("deleting") as show:
            num = 0

            def count() -> None:
                nonlocal num
                num += 1
                show(num, len(plan.doomed))

            done = await collect(blobs, plan.doomed, plan.older_than, count)
        for upload in plan.uploads:
            await abort_upload(blobs.client, upload)
        return plan, done


def _show_inspection(console: Console, found: Inspection) -> None:
    for title, findings in (("missing", found.missing), ("altered", found.altered)):
        if findings:
            console.print(f"[red]{title}: {len(findings):,}[/red]")
            console.print(_findings_table(findings))
    console.print(
        f"{found.num_referenced:,} blobs are referenced; {found.num_read:,} were read, {found.num_bytes:,} bytes",
        highlight=False,
    )
    if found.elsewhere:
        console.print(f"{len(found.elsewhere):,} checkpoints are on their trainers' disks only", highlight=False)
    if found.unreferenced:
        size = sum(b.size_bytes for b in found.unreferenced)
        console.print(
            f"{len(found.unreferenced):,} blobs are not referenced, {size:,} bytes; `esper storage gc` collects them",
            highlight=False,
        )
    console.print("every referenced blob is whole" if found.is_whole else "[red]not whole[/red]")


def _findings_table(findings: list[Finding]) -> Table:
    table = Table("kind", "sha256", "what", "named by")
    for finding in findings[:MAX_SHOWN]:
        table.add_row(finding.kind, finding.digest, finding.problem, ", ".join(finding.referenced_by))
    return table


def _show_collection(console: Console, plan: CollectionPlan, done: Collected | None) -> None:
    size = sum(b.size_bytes for b in plan.doomed)
    console.print(
        f"{plan.num_stored:,} blobs, {plan.num_referenced:,} of them referenced; {len(plan.doomed):,} are not, and "
        f"were stored before {plan.older_than:%Y-%m-%d %H:%M} UTC: {size:,} bytes; {len(plan.uploads):,} dead uploads",
        highlight=False,
    )
    if done is None:
        for blob in plan.doomed[:MAX_SHOWN]:
            console.print(f"  {blob.kind}/{blob.digest}  {blob.size_bytes:,} bytes", highlight=False)
        console.print("nothing was deleted; --delete does it")
        return
    freed = sum(b.size_bytes for b in done.deleted)
    console.print(f"deleted {len(done.deleted):,} blobs, {freed:,} bytes", highlight=False)
    for what, blobs in (("stored again meanwhile, kept", done.revived), ("gone already", done.gone)):
        if blobs:
            console.print(f"{len(blobs):,} {what}", highlight=False)
    if done.unsure:
        console.print(f"[yellow]S3 did not answer for {len(done.unsure):,}; run it again[/yellow]")


def _told(found: Inspection) -> dict[str, Any]:
    return {
        "num_referenced": found.num_referenced,
        "num_read": found.num_read,
        "num_bytes": found.num_bytes,
        "missing": [asdict(f) for f in found.missing],
        "altered": [asdict(f) for f in found.altered],
        "on_trainers_disks": [digest for _kind, digest in found.elsewhere],
        "unreferenced": [_shown(b) for b in found.unreferenced],
    }


def _told_collection(plan: CollectionPlan, done: Collected | None) -> dict[str, Any]:
    return {
        "num_stored": plan.num_stored,
        "num_referenced": plan.num_referenced,
        "older_than": plan.older_than,
        "doomed": [_shown(b) for b in plan.doomed],
        "dead_uploads": [u.key for u in plan.uploads],
        "deleted": None if done is None else [b.digest for b in done.deleted],
        "revived": None if done is None else [b.digest for b in done.revived],
        "unsure": None if done is None else [b.digest for b in done.unsure],
    }


def _shown(blob: StoredBlob) -> dict[str, Any]:
    return asdict(blob)


def _print_json(value: dict[str, Any] | Iterable[dict[str, Any]]) -> None:
    typer.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, so that stdout is for what was found."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, todo: bar.update(task, completed=done, total=todo)
