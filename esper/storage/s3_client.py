"""S3Client: one bucket over the network, with retries, deadlines and translated errors.

Requests are retried in two layers: aiobotocore's adaptive mode, which slows down while S3 throttles; and around it
retries of requests and interrupted bodies until the operation's deadline. Invariant: an operation that makes no
progress for its deadline ends with ``UnavailableError``.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

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
from esper.retry import retry_forever

CONNECT_TIMEOUT_S = 5
MAX_ATTEMPTS = 3  # of one request, by aiobotocore
KEEPALIVE_S = 30.0  # an idle connection is kept this long; servers usually close theirs after a minute
RETRY_S = (0.1, 2.0)  # first and longest wait before a request is sent again

MISSING_CODES = ("404", "NoSuchKey", "NotFound")
REFUSED_CODES = (
    "401",
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
)
DAMAGED_CODES = ("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout", "RequestTimeTooSkewed")
"""S3's error codes for a request that was damaged or late in transit: send it again."""

NETWORK_ERRORS = (BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError)
"""What the drivers raise where S3 does not answer, or its response cannot be parsed; a TimeoutError is an OSError."""

Outcome = Literal["ok", "missing", "altered", "refused", "unavailable", "failed", "cancelled"]

T = TypeVar("T")


class NoSuchUploadError(ContractError):
    """S3 no longer has a multipart upload: it was completed or aborted, or the server restarted."""


@dataclass(frozen=True, slots=True)
class FinishedOperation:
    """An operation that has ended; all its requests and retries are included."""

    operation: str
    outcome: Outcome
    seconds: float
    num_retries: int
    num_bytes: int  # blob bytes sent or received, those of failed attempts included


Observer = Callable[[FinishedOperation], None]
"""Called in the event loop after each operation. Must not block or raise. Fault tests count retries with it."""


def ignore_operation(_finished: FinishedOperation) -> None:
    """The default observer."""


class S3Client:
    """The connections to one bucket. An async context manager.

    Raises:
        ConfigError: on entering: the endpoint is not a URL.
    """

    def __init__(self, s3: S3Settings, observe: Observer = ignore_operation) -> None:
        self.s3 = s3
        self._observe = observe
        self._exits = AsyncExitStack()
        self._client: Any = None
        self._slots = asyncio.Semaphore(s3.pool_size)  # an operation's deadline starts once it has a connection

    async def __aenter__(self) -> Self:
        config = AioConfig(
            max_pool_connections=self.s3.pool_size,
            retries={"mode": "adaptive", "total_max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=self.s3.read_timeout_s,
            connector_args={"keepalive_timeout": KEEPALIVE_S, "socket_factory": _socket_with_keepalive},
            # uploads send SHA-256 and MD5 in headers; not every S3 server supports the driver's trailers
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        )
        try:
            client = get_session().create_client(
                "s3",
                endpoint_url=self.s3.endpoint_url,
                region_name=self.s3.region,
                aws_access_key_id=self.s3.access_key.get_secret_value(),
                aws_secret_access_key=self.s3.secret_key.get_secret_value(),
                config=config,
            )
            self._client = await self._exits.enter_async_context(client)
            instrument_s3(self._client)
        except ValueError as error:
            raise ConfigError(f"ESPER_S3__ENDPOINT_URL {self.s3.endpoint_url!r} is not a URL: {error}") from error
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._exits.aclose()

    @asynccontextmanager
    async def operation(self, name: str, deadline_s: float | None = None) -> AsyncIterator["Operation"]:
        """Run one or more requests under one name and one deadline.

        Args:
            deadline_s: the most seconds without progress, retries included; the setting ``deadline_s`` if None.

        Raises:
            UnavailableError: no progress for ``deadline_s``.
        """
        deadline_s = self.s3.deadline_s if deadline_s is None else deadline_s
        async with self._slots:
            began = time.monotonic()
            outcome: Outcome = "failed"
            timeout = asyncio.timeout(deadline_s)
            operation = Operation(self, timeout, deadline_s)
            try:
                async with timeout:
                    yield operation
                outcome = "ok"
            except TimeoutError as error:
                outcome = "unavailable"
                raise UnavailableError(
                    f"S3: {name} made no progress for {deadline_s:g} s; {operation.problem}"
                ) from error
            except BaseException as error:
                outcome = _outcome_of(error)
                raise
            finally:
                seconds = time.monotonic() - began
                self._observe(FinishedOperation(name, outcome, seconds, operation.num_retries, operation.num_bytes))

    async def send(self, method: str, options: dict[str, Any]) -> Any:
        """Send one request to this bucket, by the driver's method name, and translate its errors."""
        try:
            return await getattr(self._client, method)(Bucket=self.s3.bucket, **options)
        except ParamValidationError:
            raise
        except ClientError as error:
            raise self._translated(method, options.get("Key", ""), error) from error
        except NETWORK_ERRORS as error:
            text = str(error) or type(error).__name__
            raise UnavailableError(f"no S3 answers at {self.s3.endpoint_url}: {text}") from error

    def _translated(self, method: str, key: str, error: ClientError) -> EsperError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
        where = f"S3 at {self.s3.endpoint_url or self.s3.region}"
        if code == "NoSuchBucket":
            return ConfigError(f"{where} has no bucket {self.s3.bucket!r}: create it, or check ESPER_S3__BUCKET")
        if code == "NoSuchUpload":
            return NoSuchUploadError(f"{where} no longer has this upload of {key}")
        if code in MISSING_CODES:
            return MissingBlobError(f"there is no {key} in bucket {self.s3.bucket!r}")
        if code in REFUSED_CODES:
            return NotAllowedError(
                f"{where} refuses {method} in bucket {self.s3.bucket!r} ({code}): check ESPER_S3__ACCESS_KEY and "
                "ESPER_S3__SECRET_KEY, and the permissions of that key"
            )
        message = f"{where} refused {method} of {key or self.s3.bucket}: {error}"
        is_transient = status >= 500 or status in (408, 409, 429) or code in DAMAGED_CODES
        return UnavailableError(message) if is_transient else ContractError(message)


class Operation:
    """An operation in progress: retries requests until its deadline, which every progress extends.

    ``problem`` is why the operation makes no progress, for the error message.
    """

    def __init__(self, client: S3Client, timeout: asyncio.Timeout, deadline_s: float) -> None:
        self.num_retries = 0
        self.num_bytes = 0
        self.problem = f"no answer from {client.s3.endpoint_url or client.s3.region}"
        self._client = client
        self._timeout = timeout
        self._deadline_s = deadline_s

    async def call(self, method: str, key: str | None = None, **options: Any) -> Any:
        """Send a request, and retry it while S3 is away or busy.

        Raises:
            MissingBlobError, NoSuchUploadError, NotAllowedError, ConfigError, ContractError: S3's response.
        """
        return await self.retry(lambda: self.once(method, key, **options))

    async def once(self, method: str, key: str | None = None, **options: Any) -> Any:
        """Send a request, with the driver's own retries alone.

        Raises:
            UnavailableError: S3 is away or busy; and the errors of ``call``.
        """
        response = await self._client.send(method, options if key is None else {"Key": key, **options})
        self.num_retries += int(response["ResponseMetadata"].get("RetryAttempts", 0))
        return response

    async def retry(self, send: Callable[[], Awaitable[T]]) -> T:
        """Await ``send`` until it does not raise ``UnavailableError``; the operation's deadline ends the retries."""

        async def attempt() -> T:
            try:
                return await send()
            except UnavailableError as error:
                self.problem = str(error)
                self.num_retries += 1
                raise

        return await retry_forever(UnavailableError, *RETRY_S)(attempt)

    def note_progress(self, num_bytes: int) -> None:
        """Note bytes sent or received: the deadline starts again."""
        self.num_bytes += num_bytes
        if not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._deadline_s)


def _socket_with_keepalive(address: tuple[Any, ...]) -> socket.socket:
    """A socket that detects a dead peer while it waits."""
    family, kind, protocol, *_ = address
    connection = socket.socket(family=family, type=kind, proto=protocol)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection


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
