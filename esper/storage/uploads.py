"""Writing one object: in one request, or a file in parts.

Invariant: an object is there whole or not at all. S3 shows what a PUT or a completed upload gave it,
never a part of it, and checks the MD5 of every body. What a dead process leaves is an upload that was
not completed: no reader sees it, ``dead_uploads`` finds it.
"""

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from esper.errors import ContractError, EsperError, MissingBlobError, UnavailableError
from esper.storage.s3_client import Operation, S3Client, UploadGoneError

PART_BYTES = 8 * 1024 * 1024  # S3 wants 5 MiB at least
MAX_PARTS = 10_000  # S3's limit; larger files get larger parts
MAX_PARALLEL_PARTS = 3  # of one file: they are in memory
MAX_RESTARTS = 5  # of a whole upload that S3 has lost
ABORT_S = 5.0


@dataclass(frozen=True, slots=True)
class DeadUpload:
    """A multipart upload that was begun and not completed."""

    key: str
    upload_id: str
    begun_at: datetime


async def put(operation: Operation, key: str, data: bytes) -> None:
    """Write an object in one request."""
    await _send(operation, "put_object", key, data, await _checksums(data))
    operation.progressed(len(data))


async def put_file(operation: Operation, key: str, path: Path, size: int, digest: str) -> None:
    """Write a file in parts, a few at a time, of which no more is in memory.

    Args:
        size, digest: what the file was found to have; another one is not completed.

    Raises:
        ContractError: the file changed meanwhile.
    """
    for restart in range(MAX_RESTARTS):
        created = await operation.call("create_multipart_upload", key)
        upload_id = created["UploadId"]
        try:
            parts = await _send_parts(operation, key, upload_id, path, size, digest)
            await _complete(operation, key, upload_id, parts, size)
        except UploadGoneError as error:
            operation.trouble = str(error)
            operation.num_retries += 1
            if restart == MAX_RESTARTS - 1:
                raise UnavailableError(f"S3 lost the upload of {key} {MAX_RESTARTS} times: {error}") from error
        except BaseException:
            await _abort_soon(operation, key, upload_id)
            raise
        else:
            return


async def dead_uploads(client: S3Client) -> AsyncIterator[DeadUpload]:
    """Every upload in the bucket that was not completed, those under way among them."""
    markers: dict[str, str] = {}
    while True:
        async with client.operation("list_uploads") as operation:
            try:
                page = await operation.call("list_multipart_uploads", **markers)
            except UploadGoneError:  # what rclone says where there are none
                return
        for upload in page.get("Uploads", []):
            yield DeadUpload(upload["Key"], upload["UploadId"], upload["Initiated"])
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


async def abort_upload(client: S3Client, upload: DeadUpload) -> None:
    """Give its parts up. Fine where somebody did so already."""
    async with client.operation("abort_upload") as operation:
        try:
            await operation.call("abort_multipart_upload", upload.key, UploadId=upload.upload_id)
        except UploadGoneError:
            return


async def _send_parts(
    operation: Operation,
    key: str,
    upload_id: str,
    path: Path,
    size: int,
    digest: str,
) -> list[dict[str, Any]]:
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    hasher, in_order = hashlib.sha256(), asyncio.Lock()
    parts: list[dict[str, Any]] = []

    async def keep_sending(file: BinaryIO) -> None:
        while True:
            async with in_order:
                data = await asyncio.to_thread(_read_part, file, part_bytes, hasher)
                if not data:
                    return
                part: dict[str, Any] = {"PartNumber": len(parts) + 1}
                parts.append(part)
            named = {"UploadId": upload_id, "PartNumber": part["PartNumber"], **_md5(data)}
            sent = await _send(operation, "upload_part", key, data, named)
            part["ETag"] = sent["ETag"]
            operation.progressed(len(data))

    try:
        with path.open("rb") as file:
            async with asyncio.TaskGroup() as sending:
                for _number in range(MAX_PARALLEL_PARTS):
                    sending.create_task(keep_sending(file))
    except BaseExceptionGroup as group:
        raise _first_error(group) from group
    if hasher.hexdigest() != digest:
        raise ContractError(f"{path} changed while it was uploaded: upload what does not change")
    return parts


async def _send(operation: Operation, method: str, key: str, data: bytes, options: dict[str, Any]) -> Any:
    """A body is a stream of its own in each attempt: the one before may be half read."""
    length = len(data)
    return await operation.until_done(
        lambda: operation.once(method, key, Body=io.BytesIO(data), ContentLength=length, **options)
    )


def _read_part(file: BinaryIO, part_bytes: int, hasher: Any) -> bytes:
    data = file.read(part_bytes)
    hasher.update(data)
    return data


async def _complete(operation: Operation, key: str, upload_id: str, parts: list[dict[str, Any]], size: int) -> None:
    """An answer that got lost looks like an upload that is gone: then the object itself says how it went."""
    try:
        await operation.call("complete_multipart_upload", key, UploadId=upload_id, MultipartUpload={"Parts": parts})
    except UploadGoneError:
        try:
            found = await operation.call("head_object", key)
        except MissingBlobError:
            found = {"ContentLength": -1}
        if found["ContentLength"] != size:
            raise


async def _abort_soon(operation: Operation, key: str, upload_id: str) -> None:
    """Within ``ABORT_S``; what is left then is found by ``dead_uploads``."""
    try:
        async with asyncio.timeout(ABORT_S):
            await operation.once("abort_multipart_upload", key, UploadId=upload_id)
    except (EsperError, TimeoutError):
        return


async def _checksums(data: bytes) -> dict[str, str]:
    if len(data) > PART_BYTES:
        return await asyncio.to_thread(_md5_and_sha256, data)
    return _md5_and_sha256(data)


def _md5_and_sha256(data: bytes) -> dict[str, str]:
    return {**_md5(data), "ChecksumSHA256": base64.b64encode(hashlib.sha256(data).digest()).decode()}


def _md5(data: bytes) -> dict[str, str]:
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first
