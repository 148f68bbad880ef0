"""Content-addressed blobs in S3: kernels and checkpoints. A key is the SHA-256 of the bytes, checked on every read.

Invariant: what ``put`` gave a digest of is in S3, whole, and stays for the collector's grace period,
within which the event that names it must be in the log. A blob is never changed.
"""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from esper.config import S3Settings
from esper.errors import AlteredBlobError, MissingBlobError, UnavailableError
from esper.storage.blob_keys import SHORT, BlobKind, StoredBlob, key_of, parse_key
from esper.storage.call_stats import Observer, ignore
from esper.storage.downloads import download
from esper.storage.s3_client import Operation, S3Client
from esper.storage.tombstones import standing
from esper.storage.uploads import put, put_file

MAX_PARALLEL_UPLOADS = 10  # blobs on their way at once
MULTIPART_BYTES = 16 * 1024 * 1024  # larger files go in parts
MARK_POLL_S = 0.5
HASH_BYTES = 1024 * 1024


class BlobStore:
    """Async context manager around one bucket.

    Args:
        s3: where it is.
        observe: told of every operation when it ended.
    """

    def __init__(self, s3: S3Settings, observe: Observer = ignore) -> None:
        self.client = S3Client(s3, observe)
        self._exits = AsyncExitStack()
        self._uploads = asyncio.Semaphore(MAX_PARALLEL_UPLOADS)

    async def __aenter__(self) -> Self:
        await self._exits.enter_async_context(self.client)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def put(self, data: bytes, *, kind: BlobKind = BlobKind.KERNEL) -> str:
        """Store bytes and give their SHA-256 back. Storing them again changes nothing but their age.

        Raises:
            NotAllowedError: S3 refuses these keys.
            UnavailableError: S3 did not take them.
        """
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        key = key_of(kind, digest)
        async with self._uploads, self.client.operation("put") as operation:
            while True:
                await put(operation, key, data)
                if await _is_settled(operation, key, len(data)):
                    return digest

    async def put_many(self, blobs: Iterable[bytes], *, kind: BlobKind = BlobKind.KERNEL) -> list[str]:
        """Store all, ``MAX_PARALLEL_UPLOADS`` at a time; their digests, in order. All are tried before one raises.

        Raises:
            NotAllowedError, UnavailableError: as ``put``.
        """
        done = await asyncio.gather(*(self.put(data, kind=kind) for data in blobs), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return [str(digest) for digest in done]

    async def put_file(self, path: Path, *, kind: BlobKind = BlobKind.CHECKPOINT) -> str:
        """Store a file of any size, of which a few parts are in memory; gives its SHA-256 back.

        Raises:
            ContractError: it changed meanwhile.
            NotAllowedError, UnavailableError: as ``put``.
        """
        size, digest = await asyncio.to_thread(_measure, path)
        if size <= MULTIPART_BYTES:
            return await self.put(await asyncio.to_thread(path.read_bytes), kind=kind)
        key = key_of(kind, digest)
        async with self._uploads, self.client.operation("put_file") as operation:
            while True:
                await put_file(operation, key, path, size, digest)
                if await _is_settled(operation, key, size):
                    return digest

    async def get(
        self, digest: str, *, max_bytes: int, kind: BlobKind = BlobKind.KERNEL, deadline_s: float | None = None
    ) -> bytes:
        """The bytes of a blob, verified.

        Args:
            deadline_s: how long it may get nowhere; the setting where it is None.

        Raises:
            MissingBlobError: there is no such blob.
            AlteredBlobError: its bytes are not those of its name.
            KernelError: it is larger than ``max_bytes``; it was not read.
            NotAllowedError: S3 refuses these keys.
            UnavailableError: S3 did not answer.
        """
        async with self.client.operation("get", deadline_s) as operation:
            taken: list[bytes] = []
            await _verified(operation, key_of(kind, digest), digest, taken.clear, taken.append, max_bytes)
            return b"".join(taken)

    async def get_file(self, digest: str, path: Path, *, max_bytes: int, kind: BlobKind = BlobKind.CHECKPOINT) -> None:
        """Write a verified blob to ``path``, which is there whole or not at all.

        Raises:
            As ``get``; OSError: the disk does not take it.
        """
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        async with self.client.operation("get_file") as operation:
            try:
                with partial.open("wb") as file:

                    def restart() -> None:
                        file.seek(0)
                        file.truncate()

                    await _verified(operation, key_of(kind, digest), digest, restart, file.write, max_bytes)
                    file.flush()
                    await asyncio.to_thread(os.fsync, file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    async def check(self, digest: str, *, kind: BlobKind = BlobKind.KERNEL) -> int:
        """Read a blob through without keeping it; gives its size.

        Raises:
            MissingBlobError, AlteredBlobError, NotAllowedError, UnavailableError: as ``get``.
        """
        async with self.client.operation("check") as operation:
            sizes: list[int] = []
            key = key_of(kind, digest)
            await _verified(operation, key, digest, sizes.clear, lambda data: sizes.append(len(data)), 1 << 62)
            return sum(sizes)

    async def exists(self, digest: str, *, kind: BlobKind = BlobKind.KERNEL) -> bool:
        """Whether the bucket has the blob now. Only ``put`` makes sure that it stays."""
        async with self.client.operation("exists") as operation:
            return await _size_of(operation, key_of(kind, digest)) is not None

    async def blobs(self, kind: BlobKind) -> AsyncIterator[StoredBlob]:
        """All blobs of a kind, by digest. Keys that are no blob's are passed over."""
        token: dict[str, str] = {}
        while True:
            async with self.client.operation("list") as operation:
                page = await operation.call("list_objects_v2", Prefix=f"{kind}/", **token)
            for row in page.get("Contents", []):
                if (parsed := parse_key(row["Key"])) is not None:
                    yield StoredBlob(*parsed, row["Size"], row["LastModified"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}


async def _verified(
    operation: Operation,
    key: str,
    digest: str,
    restart: Callable[[], object],
    take: Callable[[bytes], object],
    max_bytes: int,
) -> None:
    """Read until the bytes are those of the name; the same wrong bytes twice are in S3, not on the way."""
    wrong = ""

    async def attempt() -> None:
        nonlocal wrong
        restart()
        found = await download(operation, key, take, max_bytes=max_bytes)
        if found == digest:
            return
        if found == wrong:
            raise AlteredBlobError(
                f"the bytes of {key[: -len(digest) + SHORT]} are not those of its name: it was altered"
            )
        wrong = found
        raise UnavailableError(f"{key} did not arrive as its name says")

    await operation.until_done(attempt)


async def _is_settled(operation: Operation, key: str, size: int) -> bool:
    """Whether a blob that was just written stays: no collector has it in hand. Waits for one that has."""
    while (found := await standing(operation, key)).is_doomed:
        operation.trouble = "a collector has this blob in hand; it is stored once he is through"
        await asyncio.sleep(MARK_POLL_S)
    return found.size_bytes == size


async def _size_of(operation: Operation, key: str) -> int | None:
    try:
        return int((await operation.call("head_object", key))["ContentLength"])
    except MissingBlobError:
        return None


def _measure(path: Path) -> tuple[int, str]:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASH_BYTES):
            hasher.update(data)
        return file.tell(), hasher.hexdigest()
