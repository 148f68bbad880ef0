"""One bucket over the network: operations with their retries, their deadline, and errors that say what to do.

Two layers of patience: aiobotocore's adaptive retries, which send less while S3 says that it is too
much; and, around them, one that goes on until the operation's deadline, for requests and for bodies
that broke off. Invariant: an operation ends, one way or another, when nothing got on for its deadline.
"""

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from botocore.parsers import ResponseParserError

from esper.config import S3Settings
from esper.errors import (
    AlteredBlobError,
    ConfigError,
    ContractError,
    EsperError,
    MissingBlobError,
    NotAllowedError,
    UnavailableError,
)
from esper.metrics.client_metrics import instrument_s3
from esper.storage.call_stats import Observer, Outcome, StorageCall, ignore

CONNECT_TIMEOUT_S = 5
MAX_ATTEMPTS = 3  # of one request by aiobotocore, with its adaptive waits; ours go on until the deadline
KEEPALIVE_S = 30.0  # an idle connection is kept so long; servers close theirs after a minute, as a rule
RETRY_S = (0.1, 2.0)  # the first wait and the longest

ABSENT = ("404", "NoSuchKey", "NotFound")
REFUSED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
SPOILT = ("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout", "RequestTimeTooSkewed")
"""What S3 says of a request that did not arrive as it was sent: send it again."""

NETWORK_ERRORS = (BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError)
"""What the drivers raise when S3 does not answer, or not in words that can be read; TimeoutError is an OSError."""

T = TypeVar("T")


class UploadGoneError(ContractError):
    """S3 does not know a multipart upload (any more): it was completed, aborted, or its server restarted."""


class S3Client:
    """Async context manager around the connections to one bucket."""

    def __init__(self, s3: S3Settings, observe: Observer = ignore) -> None:
        self.s3 = s3
        self._observe = observe
        self._exits = AsyncExitStack()
        self._client: Any = None
        self._slots = asyncio.Semaphore(s3.pool_size)  # who waits for a connection has not begun

    async def __aenter__(self) -> Self:
        config = AioConfig(
            max_pool_connections=self.s3.pool_size,
            retries={"mode": "adaptive", "total_max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=self.s3.read_timeout_s,
            connector_args={"keepalive_timeout": KEEPALIVE_S, "socket_factory": _kept_alive},
            # we send SHA-256 and MD5 ourselves; the driver's own trailers are not understood by every store
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        )
        try:
            opened = get_session().create_client(
                "s3",
                endpoint_url=self.s3.endpoint_url,
                region_name=self.s3.region,
                aws_access_key_id=self.s3.access_key.get_secret_value(),
                aws_secret_access_key=self.s3.secret_key.get_secret_value(),
                config=config,
            )
            self._client = await self._exits.enter_async_context(opened)
            instrument_s3(self._client)
        except ValueError as error:
            raise ConfigError(f"ESPER_S3__ENDPOINT_URL {self.s3.endpoint_url!r} is no address: {error}") from error
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    @asynccontextmanager
    async def operation(self, name: str, deadline_s: float | None = None) -> AsyncIterator["Operation"]:
        """Do something that takes one request or many, observed as one.

        Raises:
            UnavailableError: nothing got on for ``deadline_s`` (the setting where it is None), retries included.
        """
        patience_s = self.s3.deadline_s if deadline_s is None else deadline_s
        async with self._slots:
            began = time.monotonic()
            outcome: Outcome = "failed"
            timeout = asyncio.timeout(patience_s)
            operation = Operation(self, timeout, patience_s)
            try:
                async with timeout:
                    yield operation
                outcome = "ok"
            except TimeoutError as error:
                outcome = "unavailable"
                raise UnavailableError(
                    f"S3: {name} did not get on for {patience_s:g} s; {operation.trouble}"
                ) from error
            except BaseException as error:
                outcome = _outcome_of(error)
                raise
            finally:
                spent = time.monotonic() - began
                self._observe(StorageCall(name, outcome, spent, operation.num_retries, operation.num_bytes))

    async def send(self, method: str, options: dict[str, Any]) -> Any:
        """One request, as the driver has it, to this bucket; its errors are ours."""
        try:
            return await getattr(self._client, method)(Bucket=self.s3.bucket, **options)
        except ParamValidationError:
            raise
        except ClientError as error:
            raise self._explained(method, options.get("Key", ""), error) from error
        except NETWORK_ERRORS as error:
            text = str(error) or type(error).__name__
            raise UnavailableError(f"no S3 answers at {self.s3.endpoint_url}: {text}") from error

    def _explained(self, method: str, key: str, error: ClientError) -> EsperError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
        where = f"S3 at {self.s3.endpoint_url or self.s3.region}"
        if code == "NoSuchBucket":
            return ConfigError(f"{where} has no bucket {self.s3.bucket!r}: make it, or check ESPER_S3__BUCKET")
        if code == "NoSuchUpload":
            return UploadGoneError(f"{where} knows no such upload of {key}")
        if code in ABSENT:
            return MissingBlobError(f"there is no {key} in bucket {self.s3.bucket!r}")
        if code in REFUSED:
            return NotAllowedError(
                f"{where} refuses {method} in bucket {self.s3.bucket!r} ({code}): check ESPER_S3__ACCESS_KEY and "
                "ESPER_S3__SECRET_KEY, and what that key may do"
            )
        told = f"{where} refused {method} of {key or self.s3.bucket}: {error}"
        is_passing = status >= 500 or status in (408, 409, 429) or code in SPOILT
        return UnavailableError(told) if is_passing else ContractError(told)


class Operation:
    """One operation under way: sends requests again until its deadline, which every progress puts off."""

    def __init__(self, client: S3Client, timeout: asyncio.Timeout, deadline_s: float) -> None:
        self.num_retries = 0
        self.num_bytes = 0
        self.trouble = f"no answer from {client.s3.endpoint_url or client.s3.region}"
        self._client = client
        self._timeout = timeout
        self._deadline_s = deadline_s

    async def call(self, method: str, key: str | None = None, **options: Any) -> Any:
        """One request, again and again while S3 is away or busy.

        Raises:
            MissingBlobError, UploadGoneError, NotAllowedError, ConfigError, ContractError: S3 answered so.
        """
        return await self.until_done(lambda: self.once(method, key, **options))

    async def once(self, method: str, key: str | None = None, **options: Any) -> Any:
        """One request, with no more than the driver's own retries.

        Raises:
            UnavailableError: S3 is away or busy; and what ``call`` raises.
        """
        answer = await self._client.send(method, options if key is None else {"Key": key, **options})
        self.num_retries += int(answer["ResponseMetadata"].get("RetryAttempts", 0))
        return answer

    async def until_done(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try until it does not raise ``UnavailableError``; the operation's deadline ends it."""
        wait_s = RETRY_S[0]
        while True:
            try:
                return await attempt()
            except UnavailableError as error:
                self.trouble = str(error)
            self.num_retries += 1
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))  # who failed together must not come back together
            wait_s = min(2 * wait_s, RETRY_S[1])

    def progressed(self, num_bytes: int) -> None:
        """So many bytes went through: the deadline begins anew."""
        self.num_bytes += num_bytes
        if not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._deadline_s)


def _kept_alive(address: tuple[Any, ...]) -> socket.socket:
    """A socket that notices, while it waits, that the other side is gone."""
    family, kind, protocol, *_ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return made


def _outcome_of(error: BaseException) -> Outcome:
    match error:
        case MissingBlobError():
            return "missing"
        case AlteredBlobError():
            return "altered"
        case NotAllowedError():
            return "refused"
        case UnavailableError():
            return "unavailable"
        case asyncio.CancelledError():
            return "cancelled"
        case _:
            return "failed"
