"""Brings blobs to S3, several at a time, and reads each back before it counts as there."""

import asyncio
from collections.abc import Sequence

from esper.errors import EsperError
from esper.kasmina.catalogue import MAX_KERNEL_BYTES
from esper.storage.blobs import BlobStore


async def upload(blobs: BlobStore, many: Sequence[bytes], *, at_once: int) -> list[str | EsperError]:
    """The SHA-256 of each blob once S3 gave its bytes back, or why it is not there; in the same order.

    One that fails keeps none of the others from arriving. Doing it again changes nothing.
    """
    slots = asyncio.Semaphore(at_once)

    async def one(data: bytes) -> str | EsperError:
        async with slots:
            try:
                digest = await blobs.put(data)
                await blobs.get(digest, max_bytes=MAX_KERNEL_BYTES)  # checks the bytes against the name
            except EsperError as error:
                return error
            return digest

    return list(await asyncio.gather(*(one(data) for data in many)))
