"""The owner of a bucket: the object ``owner`` holds the id of the Kafka cluster whose log references the blobs.

A garbage collector that reads another cluster's log would see every blob of the first as unreferenced.
"""

from esper.errors import ConflictError, MissingBlobError
from esper.storage.downloads import download
from esper.storage.s3_client import Operation, S3Client
from esper.storage.uploads import put

KEY = "owner"
MAX_BYTES = 1_000


async def verify_owner(client: S3Client, cluster_id: str) -> None:
    """Check that the bucket belongs to this cluster; a bucket without an owner belongs to it from now on.

    Raises:
        ConflictError: the bucket belongs to another cluster.
    """
    async with client.operation("claim") as operation:
        owner = await _read_owner(operation)
        if owner is None:
            await put(operation, KEY, cluster_id.encode())
            owner = await _read_owner(operation)  # another cluster may have written its id in between
    if owner and owner != cluster_id:
        raise ConflictError(
            f"bucket {client.s3.bucket!r} belongs to Kafka cluster {owner}, and these projections to {cluster_id}: the "
            f"blobs of the other cluster would look unreferenced. Set ESPER_S3__BUCKET to the right bucket; if cluster "
            f"{owner} no longer exists, delete the object {KEY!r} from the bucket"
        )


async def _read_owner(operation: Operation) -> str | None:
    data = bytearray()
    try:
        await download(operation, KEY, data.extend, max_bytes=MAX_BYTES)
    except MissingBlobError:
        return None
    return data.decode(errors="replace")
