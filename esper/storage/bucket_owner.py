"""Whose bucket it is: the object ``owner`` holds the id of the Kafka cluster whose log names the blobs.

A collector that knows another log would take every blob of the first for unreferenced.
"""

from esper.errors import ConflictError, MissingBlobError
from esper.storage.downloads import download
from esper.storage.s3_client import Operation, S3Client
from esper.storage.uploads import put

KEY = "owner"
MAX_BYTES = 1_000


async def claim(client: S3Client, cluster_id: str) -> str:
    """Make the bucket this cluster's unless it is somebody's; gives the cluster that it belongs to."""
    async with client.operation("claim") as operation:
        known = await _owner(operation)
        if known is None:
            await put(operation, KEY, cluster_id.encode())
            known = await _owner(operation)  # another one may have come between
        return known or cluster_id


async def verify_owner(client: S3Client, cluster_id: str) -> None:
    """See that the bucket is this cluster's; it is from now on if it was nobody's.

    Raises:
        ConflictError: it belongs to another cluster.
    """
    owner = await claim(client, cluster_id)
    if owner != cluster_id:
        raise ConflictError(
            f"bucket {client.s3.bucket!r} belongs to Kafka cluster {owner}, and these projections to {cluster_id}: the "
            f"blobs of the other one would look unreferenced. Name the right bucket (ESPER_S3__BUCKET); if cluster "
            f"{owner} is gone for good, delete the object {KEY!r} from the bucket"
        )


async def _owner(operation: Operation) -> str | None:
    data = bytearray()
    try:
        await download(operation, KEY, data.extend, max_bytes=MAX_BYTES)
    except MissingBlobError:
        return None
    return data.decode(errors="replace")
