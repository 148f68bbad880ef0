"""Reading one object: size first, then the bytes as they come; a download that broke off goes on where it was."""

import hashlib
from collections.abc import Callable

from esper.errors import KernelError, UnavailableError
from esper.storage.s3_client import NETWORK_ERRORS, Operation

CHUNK_BYTES = 256 * 1024


async def download(operation: Operation, key: str, take: Callable[[bytes], object], *, max_bytes: int) -> str:
    """Hand the bytes of an object to ``take``, in order, each once; gives their SHA-256.

    Raises:
        KernelError: it has more than ``max_bytes``; nothing was taken.
        MissingBlobError, NotAllowedError, UnavailableError: S3 does not give it.
    """
    offset, hasher = 0, hashlib.sha256()

    async def go_on() -> None:
        nonlocal offset
        found = await operation.once("get_object", key, **({"Range": f"bytes={offset}-"} if offset else {}))
        async with found["Body"] as body:
            if offset and "ContentRange" not in found:
                raise UnavailableError(f"S3 gave {key} from its start, and was asked for byte {offset}")
            size = offset + int(found["ContentLength"])
            if size > max_bytes:
                raise KernelError(f"{key} has {size:,} bytes, over {max_bytes:,}")
            try:
                while data := await body.read(CHUNK_BYTES):
                    take(data)
                    hasher.update(data)
                    offset += len(data)
                    operation.progressed(len(data))
            except NETWORK_ERRORS as error:
                raise UnavailableError(f"S3 broke off at byte {offset} of {key}: {error!r}") from error
            if offset < size:
                raise UnavailableError(f"S3 ended {key} at byte {offset} of {size}")

    await operation.until_done(go_on)
    return hasher.hexdigest()
