"""Responses to GET as bytes: their ETag, their gzip form, and a cache of them.

Owns the bytes. A response is cached with the versions of the topics that it was read from, taken before the read, and
served again only while they are the same. So a cached response is never older than a fresh read that started
``topic_versions.MAX_AGE_S`` earlier, whatever was written in between. One that never changes (a kernel) has no topics.
"""

import asyncio
import hashlib
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.errors import EsperError
from esper.services.urza.api.problems import unavailable
from esper.services.urza.api.topic_versions import TopicVersions
from esper.services.urza.lru_cache import LruCache

SCOPE_KEY = "esper.response"
MIN_GZIP_BYTES = 1000
GZIP_LEVEL = 5
GZIP_WBITS = 31  # zlib's code of the gzip format
MAX_GZIP_SHARE = 0.95  # a gzip form that is larger does not pay for its decompression
MIN_THREAD_BYTES = 64 * 1024  # larger bodies are compressed in a thread
OVERHEAD_BYTES = 1024  # of a cached response besides its bytes, about
REVALIDATE = "no-cache"  # a client may keep it, and has to revalidate it
IMMUTABLE = "max-age=31536000, immutable"


@dataclass(slots=True)
class CachedResponse:
    """The bytes of a 200.

    Attributes:
        topics: it was read from; empty: it never changes; None: it is not cached.
        gzipped: its gzip form, where that is worth it.
        versions: of its topics, before the read.
        read_at: when the read started.
    """

    body: bytes
    media_type: str
    etag: str
    topics: Sequence[str] | None
    cache_control: str
    gzipped: bytes | None = None
    versions: tuple[Any, ...] = field(default=())
    read_at: float = 0.0

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        return len(self.body) + len(self.gzipped or b"") + OVERHEAD_BYTES


def json_response(request: Request, content: Any, topics: Sequence[str]) -> Response:
    """A response with JSON that was read from the rows of these topics."""
    body = to_json(content, inf_nan_mode="null")
    etag = hashlib.blake2b(body, digest_size=16).hexdigest()
    return _recorded(request, CachedResponse(body, "application/json", etag, topics, REVALIDATE))


def immutable_response(request: Request, data: bytes, digest: str) -> Response:
    """A response with bytes that are named by their hash."""
    return _recorded(request, CachedResponse(data, "application/octet-stream", digest, (), IMMUTABLE))


def _recorded(request: Request, response: CachedResponse) -> Response:
    request.scope[SCOPE_KEY].append(response)
    return Response(response.body, media_type=response.media_type)


class ResponseCache:
    """ASGI middleware around the application: serves cached responses without calling it.

    Requests for a response that is being made wait for it: a thousand at a time cost one read.
    """

    def __init__(
        self, app: ASGIApp, cache: LruCache[bytes, CachedResponse], versions: TopicVersions, visibility: str
    ) -> None:
        self._app = app
        self._cache = cache
        self._versions = versions
        self._visibility = visibility
        self._in_flight: dict[bytes, asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app({**scope, SCOPE_KEY: []}, receive, send)
            return
        key, requested_at = scope["raw_path"] + b"?" + scope["query_string"], time.monotonic()
        try:
            found = await self._find_current(key, requested_at)
            if found is None and key in self._in_flight:
                await self._in_flight[key].wait()
                found = await self._find_current(key, requested_at)
        except EsperError as error:
            await unavailable(str(error))(scope, receive, send)
            return
        if found is None:
            found = await self._call_app(key, scope, receive, send)
        if found is not None:
            await self._respond(found, scope, send)

    async def _find_current(self, key: bytes, requested_at: float) -> CachedResponse | None:
        cached = self._cache.get(key)
        if cached is None or not cached.topics or self._versions.is_current(cached.read_at, requested_at):
            return cached
        return cached if cached.versions == await self._versions.of(cached.topics) else None

    async def _call_app(self, key: bytes, scope: Scope, receive: Receive, send: Send) -> CachedResponse | None:
        """Call the application. A response that it did not record (a problem, a status) is sent as it is."""
        recorded: list[CachedResponse] = []

        async def send_unrecorded(message: Message) -> None:
            if not recorded:
                await send(message)

        versions, read_at, done = self._versions.known, time.monotonic(), asyncio.Event()
        self._in_flight.setdefault(key, done)
        try:
            await self._app({**scope, SCOPE_KEY: recorded}, receive, send_unrecorded)
            if not recorded:
                return None
            await self._store(key, recorded[0], versions, read_at)
            return recorded[0]
        finally:
            done.set()
            if self._in_flight.get(key) is done:
                del self._in_flight[key]

    async def _store(self, key: bytes, response: CachedResponse, versions: Mapping[str, Any], read_at: float) -> None:
        if len(response.body) >= MIN_GZIP_BYTES:
            response.gzipped = await _compress(response.body)
        if response.topics is not None:
            response.versions, response.read_at = tuple(versions.get(topic) for topic in response.topics), read_at
            self._cache.put(key, response, response.num_bytes)

    async def _respond(self, response: CachedResponse, scope: Scope, send: Send) -> None:
        request_headers = Headers(scope=scope)
        accepts_gzip = _accepts_gzip(request_headers.get("accept-encoding", ""))
        gzipped = response.gzipped if accepts_gzip else None
        etag = f'"{response.etag}-gzip"' if gzipped is not None else f'"{response.etag}"'
        is_unchanged = _matches(request_headers.get("if-none-match"), response.etag)
        body = b"" if is_unchanged else response.body if gzipped is None else gzipped
        headers = MutableHeaders({"etag": etag, "vary": "Accept-Encoding"})
        headers["cache-control"] = f"{self._visibility}, {response.cache_control}"
        if not is_unchanged:
            headers["content-type"] = response.media_type
            headers["content-length"] = str(len(body))
            if gzipped is not None:
                headers["content-encoding"] = "gzip"
        status = 304 if is_unchanged else 200
        await send({"type": "http.response.start", "status": status, "headers": headers.raw})
        await send({"type": "http.response.body", "body": body})


def _accepts_gzip(accepted: str) -> bool:
    for coding in accepted.lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _matches(if_none_match: str | None, etag: str) -> bool:
    if if_none_match is None:
        return False
    tags = [t.strip().removeprefix("W/").strip('"').removesuffix("-gzip") for t in if_none_match.split(",")]
    return etag in tags or "*" in tags


async def _compress(body: bytes) -> bytes | None:
    """The gzip form; None where it is not worth it."""
    gzipped = await asyncio.to_thread(_gzip, body) if len(body) >= MIN_THREAD_BYTES else _gzip(body)
    return gzipped if len(gzipped) < MAX_GZIP_SHARE * len(body) else None


def _gzip(body: bytes) -> bytes:
    return zlib.compress(body, GZIP_LEVEL, GZIP_WBITS)
