"""Tombstones let a garbage collector and writers agree through S3 alone: an empty object marks a blob for deletion.

The collector writes a tombstone, checks the blob's age, deletes the blob, and removes the tombstone. A writer writes
the blob, then lists the blob and its tombstone until there is no tombstone: a blob that the last listing shows stays,
one that it does not show is written again. This is correct for every order of these calls. If the collector checked
after the write, the blob is young and is kept. If it checked before the write, then at the listing either the
tombstone is still there, or the collector has finished and a blob that it deleted is missing. The writer sees both.

Relies on S3's strong read-after-write consistency (since December 2020). The tombstone of a crashed collector expires
``TOMBSTONE_TTL_S`` after it was written, when none of the collector's requests can arrive any more.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from esper.storage.s3_client import Operation, S3Client

SUFFIX = ".doomed"  # of a tombstone's key; part of the format of existing buckets
DELETE_TIMEOUT_S = 20.0  # from writing the tombstone to deleting the blob
MAX_REQUEST_DELAY_S = 30 * 60.0  # S3 refuses requests signed 15 min ago; a clock 15 min fast doubles that
TOMBSTONE_TTL_S = DELETE_TIMEOUT_S + MAX_REQUEST_DELAY_S


@dataclass(frozen=True, slots=True)
class BlobState:
    """A blob and its tombstone in one listing. Size and time are None where the bucket does not have the blob."""

    size_bytes: int | None
    modified_at: datetime | None
    has_tombstone: bool


async def server_time(client: S3Client) -> datetime:
    """The current time by S3's clock."""
    async with client.operation("clock") as operation:
        return _response_time(await operation.call("list_objects_v2", MaxKeys=1))


async def blob_state(operation: Operation, key: str) -> BlobState:
    """The state of a blob and its tombstone, from one listing."""
    page = await operation.call("list_objects_v2", Prefix=key, MaxKeys=2)
    rows = {row["Key"]: row for row in page.get("Contents", [])}
    tombstone, blob = rows.get(key + SUFFIX), rows.get(key)
    lifetime = timedelta(seconds=TOMBSTONE_TTL_S)
    has_tombstone = tombstone is not None and _response_time(page) - tombstone["LastModified"] < lifetime
    if blob is None:
        return BlobState(None, None, has_tombstone)
    return BlobState(int(blob["Size"]), blob["LastModified"], has_tombstone)


async def write_tombstone(operation: Operation, key: str) -> None:
    """Mark a blob for deletion. It may be deleted after this returns, and within ``DELETE_TIMEOUT_S``."""
    await operation.call("put_object", key + SUFFIX, Body=b"", ContentLength=0)


async def remove_tombstone(operation: Operation, key: str) -> None:
    """Remove a tombstone; no request to delete the blob may be in flight."""
    await operation.call("delete_object", key + SUFFIX)


def _response_time(response: Any) -> datetime:
    """When S3 sent a response, by its clock."""
    return parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
