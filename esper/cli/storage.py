"""`esper storage list | get | verify | gc`: the blobs in S3, compared with what the projections reference."""

import asyncio
import random
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer

from esper.cli.command_group import Commands, add_group
from esper.cli.database import database_connection
from esper.cli.terminal import EXIT_ERROR, format_time, new_table, print_json, print_line, print_table, progress_bar
from esper.config import Settings, load_settings
from esper.errors import ConfigError, MissingBlobError
from esper.storage.blob_inspection import Inspection, inspect, stored_blobs
from esper.storage.blob_keys import SHA256, BlobKind, StoredBlob
from esper.storage.blobs import BlobStore
from esper.storage.garbage_collection import Collected, collect
from esper.storage.uploads import abort_upload
from esper.streams.blob_collection import DEFAULT_GRACE, CollectionPlan, planned_collection
from esper.streams.read_models.blob_references import referenced_blobs

MAX_ROWS = 50
MAX_GET_BYTES = 1 << 40
MIN_PREFIX = 6

_JSON = typer.Option(False, "--json", help="Print JSON.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands: Commands = {"list": list_blobs, "get": get_blob, "verify": verify, "gc": gc}
    add_group(app, "storage", "List, fetch, verify and collect blobs in S3.", commands)


def list_blobs(
    kind: BlobKind | None = typer.Option(None, help="Only blobs of this kind."),
    limit: int = typer.Option(MAX_ROWS, "--limit", "-n", min=0, help="Rows to print; the totals count all blobs."),
    as_json: bool = _JSON,
) -> None:
    """List blobs, newest first."""
    found = sorted(asyncio.run(_stored(load_settings())), key=lambda b: (b.modified_at, b.digest), reverse=True)
    chosen = [b for b in found if kind is None or b.kind is kind]
    if as_json:
        print_json([asdict(b) for b in chosen])
        return
    rows = [(b.kind, b.digest, f"{b.size_bytes:,}", format_time(b.modified_at)) for b in chosen[:limit]]
    print_table(new_table("kind", "sha256", numbers=("bytes", "stored at"), rows=rows))
    print_line(f"{len(chosen):,} blobs, {_total_bytes(chosen):,} bytes")


def get_blob(
    digest: str = typer.Argument(..., help=f"SHA-256 of the blob, or its first {MIN_PREFIX} digits or more."),
    output: Path | None = typer.Option(None, "-o", "--output", help="File to write. [default: ./SHA256]"),
) -> None:
    """Download a blob into a file and verify it."""
    if not SHA256.fullmatch(digest.ljust(64, "0")) or len(digest) < MIN_PREFIX:
        raise ConfigError(f"{digest!r} is not a SHA-256; write {MIN_PREFIX} to 64 hexadecimal digits in lower case")
    blob, path = asyncio.run(_get(load_settings(), digest, output))
    typer.echo(f"{path}: {blob.size_bytes:,} bytes, verified ({blob.kind}/{blob.digest})")


def verify(
    sample: float = typer.Option(
        1.0,
        min=0.0,
        max=1.0,
        help="Share of the blobs to download and compare with their SHA-256; all must exist.",
    ),
    seed: int | None = typer.Option(None, help="Random seed of the sample. [default: different each time]"),
    as_json: bool = _JSON,
) -> None:
    """Verify that every referenced blob exists and is unaltered. Exits with 1 if one is missing or altered."""
    found = asyncio.run(_inspect(load_settings(), sample, random.Random(seed)))
    if as_json:
        print_json({**_inspection_fields(found), "is_whole": found.is_whole})
    else:
        _print_inspection(found)
    if not found.is_whole:
        raise typer.Exit(EXIT_ERROR)


def gc(
    delete: bool = typer.Option(False, "--delete", help="Delete. Without this option the command only lists."),
    grace_h: float = typer.Option(
        DEFAULT_GRACE / timedelta(hours=1), "--grace-h", help="Keep blobs stored within this many hours."
    ),
    as_json: bool = _JSON,
) -> None:
    """Delete blobs that nothing references, and abort dead uploads."""
    plan, done = asyncio.run(_collect(load_settings(), delete, timedelta(hours=grace_h)))
    if as_json:
        print_json(_collection_fields(plan, done))
    else:
        _print_collection(plan, done)


async def _stored(settings: Settings) -> list[StoredBlob]:
    async with BlobStore(settings.need_s3()) as blobs:
        return list((await stored_blobs(blobs)).values())


async def _get(settings: Settings, prefix: str, output: Path | None) -> tuple[StoredBlob, Path]:
    async with BlobStore(settings.need_s3()) as blobs:
        found = [b for b in (await stored_blobs(blobs)).values() if b.digest.startswith(prefix)]
        if not found:
            raise MissingBlobError(f"no blob begins with {prefix}; `esper storage list` lists all")
        if len({b.digest for b in found}) > 1:
            raise ConfigError(f"{len(found)} blobs begin with {prefix}; write more digits")
        blob = found[0]
        path = output or Path(blob.digest)
        if path.is_dir():
            path = path / blob.digest
        await blobs.get_file(blob.digest, path, max_bytes=MAX_GET_BYTES, kind=blob.kind)
        return blob, path


async def _inspect(settings: Settings, share: float, rng: random.Random) -> Inspection:
    async with database_connection() as connection:
        references = await referenced_blobs(connection)
    with progress_bar("reading") as show:
        async with BlobStore(settings.need_s3()) as blobs:
            return await inspect(blobs, references, share=share, rng=rng, progress=show)


async def _collect(settings: Settings, delete: bool, grace: timedelta) -> tuple[CollectionPlan, Collected | None]:
    async with BlobStore(settings.need_s3()) as blobs, planned_collection(settings, blobs, grace) as plan:
        if not delete:
            return plan, None
        with progress_bar("deleting") as show:
            num = 0

            def count() -> None:
                nonlocal num
                num += 1
                show(num, len(plan.garbage))

            done = await collect(blobs, plan.garbage, plan.older_than, count)
        for upload in plan.uploads:
            await abort_upload(blobs.client, upload)
        return plan, done


def _print_inspection(found: Inspection) -> None:
    for title, findings in (("missing", found.missing), ("altered", found.altered)):
        if findings:
            print_line(f"[red]{title}: {len(findings):,}[/red]")
            rows = [(f.kind, f.digest, f.problem, ", ".join(f.referenced_by)) for f in findings[:MAX_ROWS]]
            print_table(new_table("kind", "sha256", "problem", "referenced by", rows=rows))
    print_line(f"{found.num_referenced:,} blobs referenced; {found.num_read:,} read, {found.num_bytes:,} bytes")
    if found.local_only:
        print_line(f"{len(found.local_only):,} checkpoint(s) only on the disks of their trainers")
    if found.unreferenced:
        count, size = len(found.unreferenced), _total_bytes(found.unreferenced)
        print_line(f"{count:,} blobs not referenced, {size:,} bytes; `esper storage gc` collects them")
    print_line("all referenced blobs are intact" if found.is_whole else "[red]some referenced blobs are damaged[/red]")


def _print_collection(plan: CollectionPlan, done: Collected | None) -> None:
    print_line(
        f"{plan.num_stored:,} blobs stored, {plan.num_referenced:,} referenced; {len(plan.garbage):,} not referenced "
        f"and stored before {plan.older_than:%Y-%m-%d %H:%M} UTC, {_total_bytes(plan.garbage):,} bytes; "
        f"{len(plan.uploads):,} dead uploads"
    )
    if done is None:
        for blob in plan.garbage[:MAX_ROWS]:
            print_line(f"  {blob.kind}/{blob.digest}  {blob.size_bytes:,} bytes")
        print_line("nothing deleted; `--delete` deletes them")
        return
    print_line(f"deleted {len(done.deleted):,} blobs, {_total_bytes(done.deleted):,} bytes")
    for what, blobs in (("stored again in the meantime, kept", done.revived), ("already gone", done.missing)):
        if blobs:
            print_line(f"{len(blobs):,} {what}")
    if done.unconfirmed:
        print_line(f"[yellow]S3 did not answer for {len(done.unconfirmed):,} blobs; run the command again[/yellow]")


def _inspection_fields(found: Inspection) -> dict[str, Any]:
    return {
        "num_referenced": found.num_referenced,
        "num_read": found.num_read,
        "num_bytes": found.num_bytes,
        "missing": [asdict(f) for f in found.missing],
        "altered": [asdict(f) for f in found.altered],
        "on_trainers_disks": [digest for _kind, digest in found.local_only],
        "unreferenced": [asdict(b) for b in found.unreferenced],
    }


def _collection_fields(plan: CollectionPlan, done: Collected | None) -> dict[str, Any]:
    return {
        "num_stored": plan.num_stored,
        "num_referenced": plan.num_referenced,
        "older_than": plan.older_than,
        "garbage": [asdict(b) for b in plan.garbage],
        "dead_uploads": [u.key for u in plan.uploads],
        "deleted": None if done is None else [b.digest for b in done.deleted],
        "revived": None if done is None else [b.digest for b in done.revived],
        "unconfirmed": None if done is None else [b.digest for b in done.unconfirmed],
    }


def _total_bytes(blobs: Iterable[StoredBlob]) -> int:
    return sum(b.size_bytes for b in blobs)
