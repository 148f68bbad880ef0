"""Responses to GET as bytes: their ETag, their gzip form, and those that are kept for the next who asks.

Owns the bytes. An answer is kept with the versions of the topics it was read from, taken before it was
read; it is given again only while they are the same. So what is kept is never older than a fresh read
that began VERSION_AGE_S earlier, whoever wrote in between. What never changes (a kernel) has no topics.
"""

import asyncio
import hashlib
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.errors import EsperError
from esper.services.urza.api.problems import away
from esper.services.urza.api.projection_reader import Versions

KEY = "esper.answer"
GZIP_FROM_BYTES = 1000
GZIP_LEVEL = 5
GZIP_WBITS = 31  # zlib's name for the gzip format
WORTH = 0.95  # a gzip form larger than this share is not worth its unpacking
IN_A_THREAD_FROM_BYTES = 64 * 1024
MAX_SHARE = 4  # one answer may take a quarter of the room
OVERHEAD_BYTES = 1024  # of an answer besides its bytes, about
REVALIDATE = "no-cache"  # keep it, and ask whether it is still so
FOR_EVER = "max-age=31536000, immutable"


@dataclass(slots=True)
class Answer:
    """The bytes of a 200. ``topics`` None: it is not kept. ``forms``: the plain one and gzip's, where worth it."""

    body: bytes
    media_type: str
    etag: str
    topics: Sequence[str] | None
    cache_control: str
    packed: bytes | None = None
    version: tuple[Any, ...] = field(default=())
    began: float = 0.0

    @property
    def num_bytes(self) -> int:
        """What keeping it takes."""
        return len(self.body) + len(self.packed or b"") + OVERHEAD_BYTES


def answer(request: Request, content: Any, topics: Sequence[str]) -> Response:
    """JSON that was read from the rows of these topics."""
    body = to_json(content, inf_nan_mode="null")
    etag = hashlib.blake2b(body, digest_size=16).hexdigest()
    return _noted(request, Answer(body, "application/json", etag, topics, REVALIDATE))


def immutable(request: Request, data: bytes, digest: str) -> Response:
    """Bytes that are named by their hash."""
    return _noted(request, Answer(data, "application/octet-stream", digest, (), FOR_EVER))


def _noted(request: Request, made: Answer) -> Response:
    request.scope[KEY].append(made)
    return Response(made.body, media_type=made.media_type)


class LruCache:
    """Responses by what was asked, the least recently used ones dropped beyond ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Answer] = OrderedDict()

    def get(self, key: bytes) -> Answer | None:
        """The answer that was kept, whatever its version."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, made: Answer) -> None:
        """Keep an answer, unless it would take too large a share."""
        self.drop(key)
        if made.num_bytes * MAX_SHARE > self._max_bytes:
            return
        self._kept[key] = made
        self.num_bytes += made.num_bytes
        while self.num_bytes > self._max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, key: bytes) -> None:
        """Keep it no longer. Fine where it is not kept."""
        gone = self._kept.pop(key, None)
        self.num_bytes -= gone.num_bytes if gone is not None else 0


class ResponseCache:
    """ASGI middleware around the application: gives kept answers without asking it.

    Who asks for what is being made waits for it, once: a thousand at a time cost one read.
    """

    def __init__(self, app: ASGIApp, shelf: LruCache, versions: Versions, visibility: str) -> None:
        self._app = app
        self._shelf = shelf
        self._versions = versions
        self._visibility = visibility
        self._making: dict[bytes, asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app({**scope, KEY: []}, receive, send)
            return
        key, asked_at = scope["raw_path"] + b"?" + scope["query_string"], time.monotonic()
        try:
            found = await self._still_true(key, asked_at)
            if found is None and key in self._making:
                await self._making[key].wait()
                found = await self._still_true(key, asked_at)
        except EsperError as error:
            await away(str(error))(scope, receive, send)
            return
        if found is None:
            found = await self._make(key, scope, receive, send)
        if found is not None:
            await self._give(found, scope, send)

    async def _still_true(self, key: bytes, asked_at: float) -> Answer | None:
        kept = self._shelf.get(key)
        if kept is None or not kept.topics or self._versions.is_recent(kept.began, asked_at):
            return kept
        return kept if kept.version == await self._versions.of(kept.topics) else None

    async def _make(self, key: bytes, scope: Scope, receive: Receive, send: Send) -> Answer | None:
        """Ask the application. What is no ``Answer`` (a problem, a status) goes out as it is."""
        made: list[Answer] = []

        async def unless_made(message: Message) -> None:
            if not made:
                await send(message)

        before, began, done = self._versions.known, time.monotonic(), asyncio.Event()
        self._making.setdefault(key, done)
        try:
            await self._app({**scope, KEY: made}, receive, unless_made)
            if not made:
                return None
            await self._keep(key, made[0], before, began)
            return made[0]
        finally:
            done.set()
            if self._making.get(key) is done:
                del self._making[key]

    async def _keep(self, key: bytes, made: Answer, before: Mapping[str, Any], began: float) -> None:
        if len(made.body) >= GZIP_FROM_BYTES:
            made.packed = await _packed(made.body)
        if made.topics is not None:
            made.version, made.began = tuple(before.get(topic) for topic in made.topics), began
            self._shelf.put(key, made)

    async def _give(self, made: Answer, scope: Scope, send: Send) -> None:
        asked = Headers(scope=scope)
        packed = made.packed if made.packed is not None and _takes_gzip(asked.get("accept-encoding", "")) else None
        etag = f'"{made.etag}-gzip"' if packed is not None else f'"{made.etag}"'
        is_known = _names(asked.get("if-none-match"), made.etag)
        body = b"" if is_known else made.body if packed is None else packed
        headers = MutableHeaders({"etag": etag, "vary": "Accept-Encoding"})
        headers["cache-control"] = f"{self._visibility}, {made.cache_control}"
        if not is_known:
            headers["content-type"] = made.media_type
            headers["content-length"] = str(len(body))
            if packed is not None:
                headers["content-encoding"] = "gzip"
        status = 304 if is_known else 200
        await send({"type": "http.response.start", "status": status, "headers": headers.raw})
        await send({"type": "http.response.body", "body": body})


def _takes_gzip(accepted: str) -> bool:
    for one in accepted.lower().split(","):
        name, _, weight = one.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _names(if_none_match: str | None, etag: str) -> bool:
    if if_none_match is None:
        return False
    tags = [t.strip().removeprefix("W/").strip('"').removesuffix("-gzip") for t in if_none_match.split(",")]
    return etag in tags or "*" in tags


async def _packed(body: bytes) -> bytes | None:
    pack = asyncio.to_thread(_gzip, body) if len(body) >= IN_A_THREAD_FROM_BYTES else None
    packed = await pack if pack is not None else _gzip(body)
    return packed if len(packed) < WORTH * len(body) else None


def _gzip(body: bytes) -> bytes:
    return zlib.compress(body, GZIP_LEVEL, GZIP_WBITS)
