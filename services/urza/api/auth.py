"""Authentication by tokens with roles, and the size limit of a body, before the application reads a request.

Owns the first check of every request. Tokens are kept as SHA-256 only, and each is compared with all of them, in
constant time. Without tokens Urza serves its own host only, and only requests whose Host header names that host: so
a web page cannot reach it under another name (DNS rebinding).
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
READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
BODY_METHODS = frozenset({"POST"})
OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/openapi.json", "/docs"})
REALM = 'Bearer realm="urza"'


class Role(IntEnum):
    """What a caller may do; a role includes the ones before it."""

    NONE = 0
    READER = 1
    WRITER = 2


class RequestAuth:
    """ASGI middleware: responds with 400, 401, 403 or 413 before the application sees the request."""

    def __init__(self, app: ASGIApp, settings: UrzaSettings) -> None:
        self._app = app
        self._settings = settings
        self._hashes = [(Role.READER, settings.reader_hashes), (Role.WRITER, settings.writer_hashes)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif scope["method"] in BODY_METHODS:
            await _BoundedRequest(self._app, scope, receive, send)()
        else:
            await self._app(scope, receive, send)

    def _refusal(self, method: str, path: str, headers: Headers) -> Response | None:
        if path not in OPEN_PATHS:
            refusal = self._check_caller(method, headers)
            if refusal is not None:
                return refusal
        if method not in BODY_METHODS:
            return None
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _too_large()
        return None

    def _check_caller(self, method: str, headers: Headers) -> Response | None:
        if not self._settings.has_tokens:
            if self._settings.allow_anonymous or _host_of(headers) in LOOPBACK:
                return None
            return problem(
                400, "without tokens Urza serves localhost and 127.0.0.1 only; set tokens, see docs/guides/security.md"
            )
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return problem(401, "no token; send Authorization: Bearer TOKEN", {"WWW-Authenticate": REALM})
        role = self._role_of(token.strip())
        if role is Role.NONE:
            challenge = {"WWW-Authenticate": f'{REALM}, error="invalid_token"'}
            return problem(401, "unknown token; check it against the settings of Urza", challenge)
        if role is Role.READER and method not in READ_METHODS:
            challenge = {"WWW-Authenticate": f'{REALM}, error="insufficient_scope"'}
            return problem(403, "this token may read only; use a writer's token", challenge)
        return None

    def _role_of(self, token: str) -> Role:
        digest = token_hash(token)
        return max((role for role, known in self._hashes if _is_among(digest, known)), default=Role.NONE)


def _is_among(digest: str, known: Iterable[str]) -> bool:
    return sum(hmac.compare_digest(digest, k) for k in known) > 0  # not any(): compare with all of them


def _host_of(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


def _too_large() -> Response:
    return problem(413, f"the body is too large; at most {MAX_BODY_BYTES:,} bytes are allowed")


class _BoundedRequest:
    """A request whose body is counted as it arrives: a chunked one does not declare its length."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._receive, self._send = app, scope, receive, send
        self._num_bytes = 0
        self._is_too_large = False

    async def __call__(self) -> None:
        await self._app(self._scope, self._counted_receive, self._guarded_send)
        if self._is_too_large:
            await _too_large()(self._scope, self._receive, self._send)

    async def _counted_receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes <= MAX_BODY_BYTES:
            return message
        self._is_too_large = True
        return {"type": "http.disconnect"}

    async def _guarded_send(self, message: Message) -> None:
        if not self._is_too_large:
            await self._send(message)
