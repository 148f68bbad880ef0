"""Blobs for tests: random ones, old ones, and the folder of the embedded S3."""

import hashlib
import time
import uuid
from pathlib import Path
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from esper.embedded.s3 import BUCKET, EmbeddedS3
from esper.storage.blob_keys import BlobKind, key_of

DAY_S = 86_400


def some_bytes() -> bytes:
    """Return random bytes, different in each call."""
    return uuid.uuid4().bytes * 50


def folder_of(s3: EmbeddedS3) -> Path:
    """Return the folder of the bucket on disk."""
    return s3.root / "data" / BUCKET


def raw_client(s3: EmbeddedS3) -> Any:
    """Return a plain client of aiobotocore."""
    return get_session().create_client(
        "s3",
        endpoint_url=s3.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        config=AioConfig(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


async def store_long_ago(s3: EmbeddedS3, *many: bytes, kind: BlobKind = BlobKind.KERNEL) -> list[str]:
    """Store blobs with a date 30 days ago (rclone reads it from ``mtime``); return their digests."""
    digests, then = [hashlib.sha256(data).hexdigest() for data in many], str(time.time() - 30 * DAY_S)
    async with raw_client(s3) as client:
        for digest, data in zip(digests, many, strict=True):
            key = key_of(kind, digest)
            await client.put_object(Bucket=BUCKET, Key=key, Body=data, Metadata={"mtime": then})
    return digests
