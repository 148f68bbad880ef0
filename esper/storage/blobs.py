"""BlobStore: content-addressed blobs in S3. A key is the SHA-256 of the bytes, verified on every read.

Invariant: once ``put`` has returned a digest, the whole blob is in S3, which verified its checksum on upload, and
survives the garbage collector's grace period, in which the event that references it must be written to the log. A blob
never changes.
"""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from esper.config import S3Settings
from esper.errors import AlteredBlobError, MissingBlobError, UnavailableError
from esper.storage.blob_keys import NUM_SHOWN_DIGITS, BlobKind, StoredBlob, key_of, parse_key
from esper.storage.downloads import download
from esper.storage.s3_client import Observer, Operation, S3Client, ignore_operation
from esper.storage.tombstones import blob_state
from esper.storage.uploads import put, put_file

MAX_PARALLEL_UPLOADS = 10
MULTIPART_BYTES = 16 * 1024 * 1024  # larger files are uploaded in parts
TOMBSTONE_POLL_S = 0.5
HASH_CHUNK_BYTES = 1024 * 1024
NO_LIMIT_BYTES = 1 << 62


class BlobStore:
    """The blobs in one bucket. An async context manager.

    Args:
        s3: the bucket, its endpoint and the credentials.
        observe: called after each operation.
    """

    def __init__(self, s3: S3Settings, observe: Observer = ignore_operation) -> None:
        self.client = S3Client(s3, observe)
        self._exits = AsyncExitStack()
        self._upload_slots = asyncio.Semaphore(MAX_PARALLEL_UPLOADS)

    async def __aenter__(self) -> Self:
        await self._exits.enter_async_context(self.client)
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._exits.aclose()

    async def put(self, data: bytes, *, kind: BlobKind = BlobKind.KERNEL) -> str:
        """Store bytes and return their SHA-256. Storing them again only renews their age.

        Raises:
            NotAllowedError: S3 refuses these credentials.
            UnavailableError: S3 does not answer, or fails, until the deadline.
        """
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        key = key_of(kind, digest)
        async with self._upload_slots, self.client.operation("put") as operation:
            while True:
                await put(operation, key, data)
                if await _is_settled(operation, key, len(data)):
                    return digest

    async def put_file(self, path: Path, *, kind: BlobKind = BlobKind.CHECKPOINT) -> str:
        """Store a file of any size and return its SHA-256. A large file is uploaded in parts, a few at a time.

        For checkpoints in S3, from which a run can resume on another machine. Trainers do not upload any yet.

        Raises:
            ContractError: the file changed during the upload.
            NotAllowedError, UnavailableError: as ``put``.
        """
        size, digest = await asyncio.to_thread(_measure, path)
        if size <= MULTIPART_BYTES:
            return await self.put(await asyncio.to_thread(path.read_bytes), kind=kind)
        key = key_of(kind, digest)
        async with self._upload_slots, self.client.operation("put_file") as operation:
            while True:
                await put_file(operation, key, path, size, digest)
                if await _is_settled(operation, key, size):
                    return digest

    async def get(
        self, digest: str, *, max_bytes: int, kind: BlobKind = BlobKind.KERNEL, deadline_s: float | None = None
    ) -> bytes:
        """The verified bytes of a blob.

        Args:
            max_bytes: a larger blob is not read.
            deadline_s: the most seconds without progress; the setting ``deadline_s`` if None.

        Raises:
            MissingBlobError: the bucket has no such blob.
            AlteredBlobError: the bytes do not match the digest.
            KernelError: the blob is larger than ``max_bytes``.
            NotAllowedError: S3 refuses these credentials.
            UnavailableError: S3 does not answer, or fails, until the deadline.
        """
        async with self.client.operation("get", deadline_s) as operation:
            chunks: list[bytes] = []
            await _download_verified(operation, key_of(kind, digest), digest, chunks.clear, chunks.append, max_bytes)
            return b"".join(chunks)

    async def get_file(self, digest: str, path: Path, *, max_bytes: int, kind: BlobKind = BlobKind.CHECKPOINT) -> None:
        """Write a verified blob to ``path``, which appears whole or not at all.

        Raises:
            OSError: the file cannot be written; and the errors of ``get``.
        """
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        async with self.client.operation("get_file") as operation:
            try:
                with partial.open("wb") as file:

                    def restart() -> None:
                        file.seek(0)
                        file.truncate()

                    await _download_verified(operation, key_of(kind, digest), digest, restart, file.write, max_bytes)
                    file.flush()
                    await asyncio.to_thread(os.fsync, file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    async def check(self, digest: str, *, kind: BlobKind = BlobKind.KERNEL) -> int:
        """Read and verify a blob without keeping its bytes; returns its size in bytes.

        Raises:
            MissingBlobError, AlteredBlobError, NotAllowedError, UnavailableError: as ``get``.
        """
        async with self.client.operation("check") as operation:
            sizes: list[int] = []

            def count(chunk: bytes) -> None:
                sizes.append(len(chunk))

            await _download_verified(operation, key_of(kind, digest), digest, sizes.clear, count, NO_LIMIT_BYTES)
            return sum(sizes)

    async def exists(self, digest: str, *, kind: BlobKind = BlobKind.KERNEL) -> bool:
        """Whether the bucket has the blob now. It may be collected afterwards; only ``put`` prevents that."""
        async with self.client.operation("exists") as operation:
            try:
                await operation.call("head_object", key_of(kind, digest))
            except MissingBlobError:
                return False
            return True

    async def blobs(self, kind: BlobKind) -> AsyncIterator[StoredBlob]:
        """All blobs of a kind, ordered by digest. Other keys are skipped."""
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


async def _download_verified(
    operation: Operation,
    key: str,
    digest: str,
    restart: Callable[[], object],
    write: Callable[[bytes], object],
    max_bytes: int,
) -> None:
    """Download until the bytes match the digest. The same wrong bytes twice are in S3, not a transfer error."""
    wrong = ""

    async def attempt() -> None:
        nonlocal wrong
        restart()
        found = await download(operation, key, write, max_bytes=max_bytes)
        if found == digest:
            return
        if found == wrong:
            raise AlteredBlobError(
                f"{key[: -len(digest) + NUM_SHOWN_DIGITS]}: its bytes do not match its SHA-256, so it was altered; "
                "store it again"
            )
        wrong = found
        raise UnavailableError(f"{key}: the bytes that arrived do not match its SHA-256")

    await operation.retry(attempt)


async def _is_settled(operation: Operation, key: str, size: int) -> bool:
    """Whether a blob that was just written stays. Waits while a collector's tombstone is on it."""
    while (state := await blob_state(operation, key)).has_tombstone:
        operation.problem = "a garbage collector is deleting this blob; it is stored again after that"
        await asyncio.sleep(TOMBSTONE_POLL_S)
    return state.size_bytes == size


def _measure(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(HASH_CHUNK_BYTES):
            hasher.update(data)
            size += len(data)
    return size, hasher.hexdigest()
