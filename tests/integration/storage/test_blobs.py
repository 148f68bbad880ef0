"""Blobs in a real S3: whole or absent, verified on every read, collected only when nothing references them."""

import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from support.conditions import wait_until_async
from support.data.storage_stats import StorageStats
from support.data.stored_blobs import folder_of, raw_client, some_bytes, store_long_ago

from esper.config import S3Settings
from esper.embedded.s3 import BUCKET, EmbeddedS3
from esper.embedded.stack import EmbeddedStack
from esper.errors import (
    AlteredBlobError,
    ConfigError,
    ContractError,
    KernelError,
    MissingBlobError,
    UnavailableError,
)
from esper.storage.blob_inspection import collectable, stored_blobs
from esper.storage.blob_keys import BlobKind, key_of
from esper.storage.blobs import MULTIPART_BYTES, BlobStore
from esper.storage.garbage_collection import collect
from esper.storage.tombstones import remove_tombstone, server_time, write_tombstone
from esper.storage.uploads import PART_BYTES, abort_upload, dead_uploads

WEEK = timedelta(days=7)


@pytest.fixture
async def blobs(stack: EmbeddedStack) -> AsyncIterator[BlobStore]:
    """The session's S3."""
    async with BlobStore(stack.settings().need_s3()) as opened:
        yield opened


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """A file that is uploaded in parts."""
    path = tmp_path / "big"
    path.write_bytes(random.Random(uuid.uuid4().int).randbytes(MULTIPART_BYTES + PART_BYTES // 2))
    return path


async def test_embedded_s3_has_the_documented_behavior(stack: EmbeddedStack) -> None:
    """Facts of this rclone that docs/guides/storage.md names: a new version that changes one fails here."""
    async with raw_client(stack.s3) as s3:

        async def put(key: str, body: bytes, **options: Any) -> str:
            try:
                await s3.put_object(Bucket=BUCKET, Key=f"facts/{key}", Body=body, **options)
            except ClientError as error:
                return str(error.response["Error"]["Code"])
            return "taken"

        assert await put("md5", b"bytes", ContentMD5="XrY7u+Ae7tCTyyK7j1rNww==") == "BadDigest"
        assert await put("sha256", b"bytes", ChecksumSHA256="47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=") == "taken"
        assert await put("once", b"first") == "taken"
        assert await put("once", b"second", IfNoneMatch="*") == "taken", "rclone ignores IfNoneMatch"
        found = await s3.list_objects_v2(Bucket=BUCKET, Prefix="facts/")
        assert [row["Key"] for row in found["Contents"]] == ["facts/once", "facts/sha256"]


async def test_file_round_trip_in_parts(blobs: BlobStore, big_file: Path, tmp_path: Path) -> None:
    digest = await blobs.put_file(big_file)
    assert digest == hashlib.sha256(big_file.read_bytes()).hexdigest()
    back = tmp_path / "back"
    await blobs.get_file(digest, back, max_bytes=1 << 30)
    assert back.read_bytes() == big_file.read_bytes()
    with pytest.raises(KernelError, match="over 1,000"):
        await blobs.get_file(digest, tmp_path / "too-big", max_bytes=1_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "big"], "no partial file is left"
    assert not [u async for u in dead_uploads(blobs.client)]


async def test_concurrent_puts_are_each_observed(stack: EmbeddedStack) -> None:
    stats, many = StorageStats(), [some_bytes() for _n in range(40)]
    async with BlobStore(stack.settings().need_s3(), stats.add) as blobs:
        digests = await asyncio.gather(*map(blobs.put, many))
        assert digests == [hashlib.sha256(data).hexdigest() for data in many]
        assert await asyncio.gather(*(blobs.get(d, max_bytes=1_000) for d in digests)) == many
        with pytest.raises(MissingBlobError, match="there is no kernels/0000"):
            await blobs.get("0" * 64, max_bytes=1)
    assert stats.calls == {("put", "ok"): 40, ("get", "ok"): 40, ("get", "missing"): 1}
    assert stats.num_bytes["put"] == stats.num_bytes["get"] == 800 * 40


async def test_upload_refuses_a_file_that_changes(blobs: BlobStore, big_file: Path) -> None:
    async with blobs.client.operation("test") as operation:
        from esper.storage.uploads import put_file

        key = key_of(BlobKind.CHECKPOINT, "a" * 64)
        with pytest.raises(ContractError, match="changed while it was uploaded"):
            await put_file(operation, key, big_file, big_file.stat().st_size, "a" * 64)
    assert not await blobs.exists("a" * 64, kind=BlobKind.CHECKPOINT)
    assert not [u async for u in dead_uploads(blobs.client)], "aborted"


async def test_cancelled_upload_leaves_nothing(blobs: BlobStore, big_file: Path) -> None:
    upload = asyncio.create_task(blobs.put_file(big_file))
    found = [await wait_until_async(lambda: first_upload(blobs), what="the upload")]
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)
    assert upload.cancelled()
    assert found
    assert not [u async for u in dead_uploads(blobs.client)]
    assert not await blobs.exists(hashlib.sha256(big_file.read_bytes()).hexdigest(), kind=BlobKind.CHECKPOINT)


async def first_upload(blobs: BlobStore) -> Any:
    return next(iter([u async for u in dead_uploads(blobs.client)]), None)


KILLED = """
import asyncio, os, sys
from pathlib import Path
from esper.config import S3Settings
from esper.storage.blobs import BlobStore
from esper.storage import uploads
sent = 0
async def slowly(operation, method, key, data, options, send=uploads._send):
    global sent
    answer = await send(operation, method, key, data, options)
    print("part", flush=True)
    await asyncio.sleep(60)
uploads._send = slowly
async def main():
    async with BlobStore(S3Settings(endpoint_url=sys.argv[1], access_key=os.environ["KEY"], secret_key=os.environ["SECRET"])) as blobs:
        await blobs.put_file(Path(sys.argv[2]))
asyncio.run(main())
"""


async def test_upload_of_a_killed_process_can_be_aborted(
    stack: EmbeddedStack, blobs: BlobStore, big_file: Path
) -> None:
    env = {**os.environ, "KEY": stack.s3.access_key, "SECRET": stack.s3.secret_key}
    command = [sys.executable, "-c", KILLED, stack.s3.endpoint_url, str(big_file)]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    assert await asyncio.to_thread(child.stdout.readline) == b"part\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    digest = hashlib.sha256(big_file.read_bytes()).hexdigest()
    assert not await blobs.exists(digest, kind=BlobKind.CHECKPOINT)
    assert digest not in {d for _kind, d in await stored_blobs(blobs)}
    dead = [u async for u in dead_uploads(blobs.client)]
    assert [u.key for u in dead] == [key_of(BlobKind.CHECKPOINT, digest)]
    for _twice in range(2):
        await abort_upload(blobs.client, dead[0])
    assert not [u async for u in dead_uploads(blobs.client)]


@pytest.fixture
def own_s3(tmp_path: Path) -> Any:
    """An S3 that the test may kill."""
    s3 = EmbeddedS3(tmp_path / "s3")
    s3.start()
    yield s3
    s3.stop()


def settings_of(s3: EmbeddedS3, **changed: Any) -> S3Settings:
    fields = {"endpoint_url": s3.endpoint_url, "access_key": s3.access_key, "secret_key": s3.secret_key}
    return S3Settings.model_validate({**fields, **changed})


async def test_operations_continue_after_an_s3_restart(own_s3: EmbeddedS3, tmp_path: Path) -> None:
    many = [random.Random(n).randbytes(200_000) for n in range(60)]
    (tmp_path / "file").write_bytes(random.Random(61).randbytes(3 * MULTIPART_BYTES))
    async with BlobStore(settings_of(own_s3)) as blobs:
        storing = [asyncio.gather(*map(blobs.put, many)), asyncio.create_task(blobs.put_file(tmp_path / "file"))]
        for num_stored in (10, 30):
            await wait_until_async(lambda n=num_stored: has_stored(own_s3, n), what=f"{num_stored} blobs")
            own_s3.kill()
            assert not any(task.done() for task in storing)
            await asyncio.to_thread(own_s3.start)
        digests, file_digest = await asyncio.gather(*storing)
        stored = await stored_blobs(blobs)
        assert {d for _kind, d in stored} == {*digests, file_digest}
        for kind, digest in stored:
            await blobs.check(digest, kind=kind)
    own_s3.stop()
    own_s3.start()
    left = [p for p in folder_of(own_s3).rglob("*") if p.is_file() and p.name.startswith(".rclone_temp")]
    assert not left, "a killed server's partial files are deleted at its next start"


async def has_stored(s3: EmbeddedS3, count: int) -> bool:
    return sum(not p.name.startswith(".") for p in (folder_of(s3) / "kernels").glob("*")) >= count


async def test_silent_s3_is_one_error_within_the_deadline(own_s3: EmbeddedS3) -> None:
    async with BlobStore(settings_of(own_s3, deadline_s=4.0)) as blobs:
        digest = await blobs.put(b"x")
        own_s3.stop()
        for attempt in (blobs.get(digest, max_bytes=1), blobs.put(b"y"), blobs.exists(digest)):
            with pytest.raises(UnavailableError, match=r"made no progress for 4 s; .*http://127\.0\.0\.1:"):
                await attempt


async def test_wrong_bucket_or_endpoint_fails_at_once(own_s3: EmbeddedS3) -> None:
    async with BlobStore(settings_of(own_s3, bucket="nobodys")) as blobs:
        for attempt in (blobs.put(b"x"), blobs.get("0" * 64, max_bytes=1)):
            with pytest.raises((ConfigError, MissingBlobError)):
                await attempt
    with pytest.raises(ConfigError, match="ESPER_S3__ENDPOINT_URL 'nonsense' is not a URL"):
        async with BlobStore(settings_of(own_s3, endpoint_url="nonsense")):
            pass


async def test_altered_bytes_are_never_returned(blobs: BlobStore, stack: EmbeddedStack, tmp_path: Path) -> None:
    data = some_bytes()
    digest = await blobs.put(data)
    place = folder_of(stack.s3) / "kernels" / digest
    place.write_bytes(data[:-1] + b"?")
    for attempt in (
        blobs.get(digest, max_bytes=1_000),
        blobs.check(digest),
        blobs.get_file(digest, tmp_path / "f", max_bytes=1_000, kind=BlobKind.KERNEL),
    ):
        with pytest.raises(AlteredBlobError, match="it was altered"):
            await attempt
    assert not (tmp_path / "f").exists()
    await blobs.put(data)
    assert await blobs.get(digest, max_bytes=1_000) == data, "storing it again repairs it"


async def test_put_waits_for_a_tombstone(blobs: BlobStore) -> None:
    data = some_bytes()
    digest = hashlib.sha256(data).hexdigest()
    async with blobs.client.operation("test") as operation:
        await write_tombstone(operation, key_of(BlobKind.KERNEL, digest))
        storing = asyncio.create_task(blobs.put(data))
        await wait_until_async(lambda: blobs.exists(digest))
        assert not storing.done()
        await operation.call("delete_object", key_of(BlobKind.KERNEL, digest))
        await remove_tombstone(operation, key_of(BlobKind.KERNEL, digest))
    assert await storing == digest
    assert await blobs.get(digest, max_bytes=1_000) == data


async def test_put_during_a_collection_is_kept(own_s3: EmbeddedS3) -> None:
    many = [some_bytes() for _n in range(60)]
    async with BlobStore(settings_of(own_s3)) as blobs:
        digests = await store_long_ago(own_s3, *many)
        older_than = await server_time(blobs.client) - WEEK
        garbage = collectable(await stored_blobs(blobs), (), older_than)
        assert len(garbage) == len(many)
        again = many[:30]
        done, *_stored = await asyncio.gather(collect(blobs, garbage, older_than), *(blobs.put(d) for d in again * 2))
        left = {d for _kind, d in await stored_blobs(blobs)}
        assert left == set(digests[:30])
        assert {b.digest for b in done.deleted} >= set(digests[30:])
        for digest in left:
            await blobs.check(digest)
