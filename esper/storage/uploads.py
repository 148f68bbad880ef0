"""Uploads one object: bytes in one request, or a file in parts.

Invariant: an object is in the bucket whole or not at all. S3 shows the result of a PUT or a completed upload, never a
part of it, and verifies the MD5 of every body. A crashed process leaves an incomplete upload: no reader sees it,
``dead_uploads`` finds it. Multipart uploads are for checkpoints in S3 (``BlobStore.put_file``).
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
from esper.storage.s3_client import NoSuchUploadError, Operation, S3Client

PART_BYTES = 8 * 1024 * 1024  # S3 requires at least 5 MiB
MAX_PARTS = 10_000  # S3's limit; a larger file has larger parts
MAX_PARALLEL_PARTS = 3  # of one file; each is in memory
MAX_RESTARTS = 5  # of an upload that S3 has lost
ABORT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class DeadUpload:
    """A multipart upload that was started and not completed."""

    key: str
    upload_id: str
    begun_at: datetime


async def put(operation: Operation, key: str, data: bytes) -> None:
    """Upload an object in one request."""
    await _send(operation, "put_object", key, data, await _checksums(data))
    operation.note_progress(len(data))


async def put_file(operation: Operation, key: str, path: Path, size: int, digest: str) -> None:
    """Upload a file in parts; at most ``MAX_PARALLEL_PARTS`` of them are in memory.

    Args:
        size: of the file, in bytes.
        digest: the SHA-256 of the file. The upload is not completed if the file no longer has this size and digest.

    Raises:
        ContractError: the file changed during the upload.
        UnavailableError: S3 lost the upload ``MAX_RESTARTS`` times.
    """
    for restart in range(MAX_RESTARTS):
        created = await operation.call("create_multipart_upload", key)
        upload_id = created["UploadId"]
        try:
            parts = await _send_parts(operation, key, upload_id, path, size, digest)
            await _complete(operation, key, upload_id, parts, size)
        except NoSuchUploadError as error:
            operation.problem = str(error)
            operation.num_retries += 1
            if restart == MAX_RESTARTS - 1:
                raise UnavailableError(f"S3 lost the upload of {key} {MAX_RESTARTS} times: {error}") from error
        except BaseException:
            await _abort_soon(operation, key, upload_id)
            raise
        else:
            return


async def dead_uploads(client: S3Client) -> AsyncIterator[DeadUpload]:
    """Every upload in the bucket that is not completed, including those in progress."""
    markers: dict[str, str] = {}
    while True:
        async with client.operation("list_uploads") as operation:
            try:
                page = await operation.call("list_multipart_uploads", **markers)
            except NoSuchUploadError:  # the response of rclone where there are none
                return
        for upload in page.get("Uploads", []):
            yield DeadUpload(upload["Key"], upload["UploadId"], upload["Initiated"])
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


async def abort_upload(client: S3Client, upload: DeadUpload) -> None:
    """Abort an upload and delete its parts. Succeeds if it was aborted already."""
    async with client.operation("abort_upload") as operation:
        try:
            await operation.call("abort_multipart_upload", upload.key, UploadId=upload.upload_id)
        except NoSuchUploadError:
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
    hasher, read_lock = hashlib.sha256(), asyncio.Lock()
    parts: list[dict[str, Any]] = []

    async def keep_sending(file: BinaryIO) -> None:
        while True:
            async with read_lock:
                data = await asyncio.to_thread(_read_part, file, part_bytes, hasher)
                if not data:
                    return
                part: dict[str, Any] = {"PartNumber": len(parts) + 1}
                parts.append(part)
            options = {"UploadId": upload_id, "PartNumber": part["PartNumber"], **_md5(data)}
            response = await _send(operation, "upload_part", key, data, options)
            part["ETag"] = response["ETag"]
            operation.note_progress(len(data))

    try:
        with path.open("rb") as file:
            async with asyncio.TaskGroup() as tasks:
                for _number in range(MAX_PARALLEL_PARTS):
                    tasks.create_task(keep_sending(file))
    except BaseExceptionGroup as group:
        raise _first_error(group) from group
    if hasher.hexdigest() != digest:
        raise ContractError(f"{path} changed while it was uploaded: upload it when nothing writes it")
    return parts


async def _send(operation: Operation, method: str, key: str, data: bytes, options: dict[str, Any]) -> Any:
    """Send a body. Each attempt has its own stream, because the one before may be partly read."""
    length = len(data)
    return await operation.retry(
        lambda: operation.once(method, key, Body=io.BytesIO(data), ContentLength=length, **options)
    )


def _read_part(file: BinaryIO, part_bytes: int, hasher: Any) -> bytes:
    data = file.read(part_bytes)
    hasher.update(data)
    return data


async def _complete(operation: Operation, key: str, upload_id: str, parts: list[dict[str, Any]], size: int) -> None:
    """Complete an upload. If S3 has no such upload, its response may have been lost: check for the object."""
    try:
        await operation.call("complete_multipart_upload", key, UploadId=upload_id, MultipartUpload={"Parts": parts})
    except NoSuchUploadError:
        try:
            response = await operation.call("head_object", key)
        except MissingBlobError:
            response = {"ContentLength": -1}
        if response["ContentLength"] != size:
            raise


async def _abort_soon(operation: Operation, key: str, upload_id: str) -> None:
    """Abort within ``ABORT_TIMEOUT_S``; ``dead_uploads`` finds an upload that is left."""
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
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
