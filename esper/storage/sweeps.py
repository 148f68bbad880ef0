"""How a collector and those who store agree, with S3 alone between them.

A collector that is about to delete says so first: a *notice* names the blobs and when it ends. Whoever
stores a blob writes it, then looks for a notice that names it, then sees that the blob is still there.
Take any order of the calls of the two: if the collector's look at the blob came after the write, the
blob is fresh and stays; if it came before, then either the notice was still there for the writer to see,
or the blob is gone and the writer sees that. In both cases it is written again.

Relies on S3 showing every write to every later read, as it does since December 2020. A notice outlives
its collector, and any request of his that the network may still hold: S3 takes none that is older than
``LATE_S``. Invariant: nothing that ``put`` gave back is deleted until it is ``grace`` old again.
"""

import hashlib
import json
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from esper.errors import MissingBlobError, UnavailableError
from esper.storage.client import Operation, S3Client
from esper.storage.downloads import download
from esper.storage.uploads import put

FOLDER = "sweeps/"
SWEEP_S = 60.0  # a collector deletes no longer than this under one notice
LATE_S = 30 * 60.0  # S3 refuses a request signed 15 min ago; one signed by a clock that is 15 min ahead, later
MAX_NOTICE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Notice:
    """These keys may be deleted until ``ends_at``, by S3's clock."""

    name: str
    keys: frozenset[str]
    ends_at: datetime


def time_of(answer: Any) -> datetime:
    """S3's clock, when it gave an answer."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])


async def post_notice(client: S3Client, keys: frozenset[str]) -> Notice:
    """Say which keys are about to be deleted; they must not be before this returns."""
    async with client.operation("notice") as operation:
        now = time_of(await operation.call("list_objects_v2", Prefix=FOLDER, MaxKeys=1))
        ends_at = now + timedelta(seconds=SWEEP_S + LATE_S)
        told = {"keys": sorted(keys), "ends_at": ends_at.isoformat(), "id": str(uuid.uuid4())}
        body = json.dumps(told).encode()
        name = FOLDER + hashlib.sha256(body).hexdigest()
        await put(operation, name, body)
    return Notice(name, keys, ends_at)


async def take_down(client: S3Client, notice: Notice) -> None:
    """The deleting is over, and none of its requests is still under way."""
    async with client.operation("notice") as operation:
        await operation.call("delete_object", notice.name)


async def current_notices(operation: Operation) -> list[Notice]:
    """The notices that have not ended."""
    page = await operation.call("list_objects_v2", Prefix=FOLDER)
    now = time_of(page)
    found = [await _read(operation, row["Key"]) for row in page.get("Contents", [])]
    return [notice for notice in found if notice is not None and notice.ends_at > now]


async def remove_ended(client: S3Client) -> None:
    """Notices of collectors that died, once they are of no use."""
    async with client.operation("notice") as operation:
        page = await operation.call("list_objects_v2", Prefix=FOLDER)
        now = time_of(page)
        for row in page.get("Contents", []):
            notice = await _read(operation, row["Key"])
            if notice is not None and notice.ends_at <= now:
                await operation.call("delete_object", notice.name)


async def _read(operation: Operation, name: str) -> Notice | None:
    """None where it was taken down meanwhile."""

    async def attempt() -> bytes:
        data = bytearray()
        digest = await download(operation, name, data.extend, max_bytes=MAX_NOTICE_BYTES)
        if digest != name.removeprefix(FOLDER):
            raise UnavailableError(f"{name} did not arrive as it was written")
        return bytes(data)

    try:
        told = json.loads(await operation.until_done(attempt))
    except MissingBlobError:
        return None
    return Notice(name, frozenset(told["keys"]), datetime.fromisoformat(told["ends_at"]))
