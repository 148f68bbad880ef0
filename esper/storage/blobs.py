"""Content-addressed blobs in S3: kernels. A key is the SHA-256 of the bytes, checked on every read."""

import hashlib
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError

from esper.config import S3Settings
from esper.errors import ContractError, KernelError, NotAllowedError, UnavailableError
from esper.metrics.clients import watch_s3

PREFIX = "kernels/"
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
MAX_ATTEMPTS = 6
_ABSENT = ("404", "NoSuchKey", "NotFound")
_REFUSED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


class BlobStore:
    """Async context manager around one bucket. Blobs are never changed and never removed."""

    def __init__(self, s3: S3Settings) -> None:
        self._s3 = s3
        self._exits = AsyncExitStack()
        self._client: Any = None

    async def __aenter__(self) -> Self:
        config = AioConfig(
            max_pool_connections=self._s3.pool_size,
            retries={"mode": "adaptive", "total_max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            tcp_keepalive=True,
            s3={"addressing_style": "path"},
        )
        opened = get_session().create_client(
            "s3",
            endpoint_url=self._s3.endpoint_url,
            region_name=self._s3.region,
            aws_access_key_id=self._s3.access_key.get_secret_value(),
            aws_secret_access_key=self._s3.secret_key.get_secret_value(),
            config=config,
        )
        self._client = await self._exits.enter_async_context(opened)
        watch_s3(self._client)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def put(self, data: bytes) -> str:
        """Store bytes and give their SHA-256 back. Storing them again changes nothing.

        Raises:
            NotAllowedError: S3 refuses these keys.
            UnavailableError: S3 did not take them.
        """
        digest = hashlib.sha256(data).hexdigest()
        await self._call("put_object", digest, Body=data, ContentLength=len(data))
        return digest

    async def get(self, digest: str, *, max_bytes: int) -> bytes:
        """The bytes of a blob, verified.

        Raises:
            ContractError: there is no such blob.
            KernelError: it is larger than ``max_bytes``, or its bytes are not those of its name.
            NotAllowedError: S3 refuses these keys.
            UnavailableError: S3 did not answer.
        """
        found = await self._call("get_object", digest)
        async with found["Body"] as body:
            if found["ContentLength"] > max_bytes:
                raise KernelError(f"blob {digest[:12]} has {found['ContentLength']} bytes, over {max_bytes}")
            try:
                data: bytes = await body.read()
            except (BotoCoreError, aiohttp.ClientError, OSError) as error:
                raise UnavailableError(f"S3 broke off in the middle of blob {digest[:12]}: {error!r}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise KernelError(f"the bytes of blob {digest[:12]} are not those of its name: it was altered")
        return data

    async def exists(self, digest: str) -> bool:
        """Whether the bucket has the blob."""
        try:
            await self._call("head_object", digest)
        except ContractError:
            return False
        return True

    async def _call(self, operation: str, digest: str, **options: Any) -> Any:
        try:
            call = getattr(self._client, operation)
            return await call(Bucket=self._s3.bucket, Key=PREFIX + digest, **options)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in _ABSENT:
                raise ContractError(f"there is no blob {digest[:12]} in {self._s3.bucket}") from error
            if code in _REFUSED:
                raise self._not_allowed(operation, code) from error
            raise UnavailableError(f"S3 refused {operation} of {digest[:12]}: {error}") from error
        except (BotoCoreError, OSError) as error:
            raise UnavailableError(f"no S3 answers at {self._s3.endpoint_url}: {error}") from error

    def _not_allowed(self, operation: str, code: str) -> NotAllowedError:
        where = f"S3 at {self._s3.endpoint_url or self._s3.region}"
        return NotAllowedError(
            f"{where} refuses {operation} in bucket {self._s3.bucket!r} ({code}): check ESPER_S3__ACCESS_KEY and "
            "ESPER_S3__SECRET_KEY, and what that key may do"
        )
