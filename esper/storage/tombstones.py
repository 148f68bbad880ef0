"""How a collector and those who store agree, with S3 alone between them: an empty object marks a blob as doomed.

The collector marks a blob, looks at its age, deletes it, takes the mark away. Whoever stores a blob writes
it, then asks with one listing for the blob and its mark, until there is no mark: a blob that is there
then stays, one that is not is written again. Take any order of these calls. If the collector looked
after the write, the blob is young and he leaves it. If he looked before it, then at the listing either the
mark is still there, or the collector is through, and a blob that he took is not there. The storer sees both.

Relies on S3 showing every write to every later read, as it does since December 2020. A mark whose
collector died is of no use once none of his requests can arrive any more, ``MARK_S`` after it was made.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from esper.storage.s3_client import Operation, S3Client

SUFFIX = ".doomed"
DELETE_S = 20.0  # a collector's time from the mark to the delete of one blob
LATE_S = 30 * 60.0  # S3 refuses a request signed 15 min ago; one signed by a clock that is 15 min ahead, later
MARK_S = DELETE_S + LATE_S


@dataclass(frozen=True, slots=True)
class Standing:
    """What one listing says of a blob. Size and time are None where the bucket does not have it."""

    size_bytes: int | None
    modified_at: datetime | None
    is_doomed: bool


def time_of(answer: Any) -> datetime:
    """S3's clock, when it gave an answer."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])


async def server_time(client: S3Client) -> datetime:
    """S3's clock, now."""
    async with client.operation("clock") as operation:
        return time_of(await operation.call("list_objects_v2", MaxKeys=1))


async def standing(operation: Operation, key: str) -> Standing:
    """A blob and its mark, in one listing."""
    page = await operation.call("list_objects_v2", Prefix=key, MaxKeys=2)
    rows = {row["Key"]: row for row in page.get("Contents", [])}
    mark, blob = rows.get(key + SUFFIX), rows.get(key)
    is_doomed = mark is not None and time_of(page) - mark["LastModified"] < timedelta(seconds=MARK_S)
    if blob is None:
        return Standing(None, None, is_doomed)
    return Standing(int(blob["Size"]), blob["LastModified"], is_doomed)


async def mark(operation: Operation, key: str) -> None:
    """Say that a blob is about to be deleted; it must not be before this returns, nor after ``DELETE_S``."""
    await operation.call("put_object", key + SUFFIX, Body=b"", ContentLength=0)


async def unmark(operation: Operation, key: str) -> None:
    """The blob is dealt with, and no request to delete it is still under way."""
    await operation.call("delete_object", key + SUFFIX)
