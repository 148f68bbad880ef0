"""Downloads one object: its size first, then its bytes in chunks. An interrupted download resumes where it stopped."""

import hashlib
from collections.abc import Callable

from esper.errors import KernelError, UnavailableError
from esper.storage.s3_client import NETWORK_ERRORS, Operation

CHUNK_BYTES = 256 * 1024


async def download(operation: Operation, key: str, write: Callable[[bytes], object], *, max_bytes: int) -> str:
    """Pass the bytes of an object to ``write``, in order, each once; returns their SHA-256.

    Raises:
        KernelError: the object is larger than ``max_bytes``; nothing was written.
        MissingBlobError, NotAllowedError, UnavailableError: S3 does not return it.
    """
    offset, hasher = 0, hashlib.sha256()

    async def resume() -> None:
        nonlocal offset
        response = await operation.once("get_object", key, **({"Range": f"bytes={offset}-"} if offset else {}))
        async with response["Body"] as body:
            if offset and "ContentRange" not in response:
                raise UnavailableError(f"S3 returned {key} from its start where byte {offset} was requested")
            size = offset + int(response["ContentLength"])
            if size > max_bytes:
                raise KernelError(f"{key} has {size:,} bytes, over {max_bytes:,}")
            try:
                while data := await body.read(CHUNK_BYTES):
                    write(data)
                    hasher.update(data)
                    offset += len(data)
                    operation.note_progress(len(data))
            except NETWORK_ERRORS as error:
                raise UnavailableError(f"S3 closed the connection at byte {offset} of {key}: {error!r}") from error
            if offset < size:
                raise UnavailableError(f"S3 ended {key} at byte {offset} of {size}")

    await operation.retry(resume)
    return hasher.hexdigest()
