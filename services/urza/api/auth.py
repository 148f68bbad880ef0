"""Who may come in: tokens with roles, and the bounds of a request, before anything of it is read.

Owns the first look at every request. Tokens are kept as SHA-256 only, and all of them are compared,
in constant time. Without tokens Urza serves its own host alone, and takes requests that were
addressed to it by a name of that host: a web page cannot reach it under a name of its own.
"""

import hmac
from collections.abc import Iterable
from enum import IntEnum
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.services.urza.api.problems import problem
from esper.services.urza.settings import LOOPBACK, UrzaSettings, token_hash

MAX_BODY_BYTES = 1024 * 1024
READING = frozenset({"GET", "HEAD", "OPTIONS"})
WITH_BODY = frozenset({"POST"})
OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json", "/docs"})
REALM = 'Bearer realm="urza"'


class Role(IntEnum):
    """What somebody may do; each may do what those before it may."""

    NONE = 0
    READER = 1
    WRITER = 2


class RequestAuth:
    """ASGI middleware: 400, 401, 403 and 413 before the application sees the request."""

    def __init__(self, app: ASGIApp, own: UrzaSettings) -> None:
        self._app = app
        self._own = own
        self._hashes = [(Role.READER, own.reader_hashes), (Role.WRITER, own.writer_hashes)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif scope["method"] in WITH_BODY:
            await _Bounded(self._app, scope, receive, send)()
        else:
            await self._app(scope, receive, send)

    def _refusal(self, method: str, path: str, headers: Headers) -> Response | None:
        if path not in OPEN_PATHS:
            refused = self._not_admitted(method, headers)
            if refused is not None:
                return refused
        if method not in WITH_BODY:
            return None
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _too_large()
        return None

    def _not_admitted(self, method: str, headers: Headers) -> Response | None:
        if not self._own.has_tokens:
            if self._own.allow_anonymous or _host_of(headers) in LOOPBACK:
                return None
            return problem(400, "without tokens Urza answers to localhost and 127.0.0.1 alone: see docs/guides/security.md")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return problem(401, "send Authorization: Bearer TOKEN", {"WWW-Authenticate": REALM})
        role = self._role_of(token.strip())
        if role is Role.NONE:
            return problem(401, "nobody has this token", {"WWW-Authenticate": f'{REALM}, error="invalid_token"'})
        if role is Role.READER and method not in READING:
            headers_ = {"WWW-Authenticate": f'{REALM}, error="insufficient_scope"'}
            return problem(403, "this token may read, not write: ask for a writer's", headers_)
        return None

    def _role_of(self, token: str) -> Role:
        digest = token_hash(token)
        return max((role for role, known in self._hashes if _is_among(digest, known)), default=Role.NONE)


def _is_among(digest: str, known: Iterable[str]) -> bool:
    return sum(hmac.compare_digest(digest, k) for k in known) > 0  # not any(): all are compared


def _host_of(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


def _too_large() -> Response:
    return problem(413, f"a body may have {MAX_BODY_BYTES:,} bytes")


class _Bounded:
    """One request whose body is counted as it arrives: a chunked one does not say its length before."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._receive, self._send = app, scope, receive, send
        self._num_bytes = 0
        self._is_over = False

    async def __call__(self) -> None:
        await self._app(self._scope, self._counted, self._unless_over)
        if self._is_over:
            await _too_large()(self._scope, self._receive, self._send)

    async def _counted(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes <= MAX_BODY_BYTES:
            return message
        self._is_over = True
        return {"type": "http.disconnect"}

    async def _unless_over(self, message: Message) -> None:
        if not self._is_over:
            await self._send(message)
