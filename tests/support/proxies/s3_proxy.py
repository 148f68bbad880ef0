"""An HTTP proxy in front of S3 that injects faults into requests, at random and on demand.

It reads the whole request before it chooses a fault, so that a fault can be a lost response to completed work, or a
body that ends at an exact byte.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from support.proxies.threaded_proxy import ThreadedProxy
from yarl import URL

FAULTS = (
    "reset",  # the connection is closed before the request reaches S3
    "response lost",  # S3 handles the request, the response is dropped
    "cut going up",  # S3 receives a part of the body
    "cut coming down",  # the client receives a part of the body
    "stall",  # no response until the client gives up; S3 may or may not receive the request
    "slow",  # in pieces, with pauses
    "slow down",  # S3's own 503
    "error 500",
    "bad gateway",  # an HTML page, as load balancers send it
    "flipped going up",  # one bit of the body is changed
    "flipped coming down",
)
PIECES = 5
PIECE_BYTES = 512 * 1024
SLOW_S = 0.02  # per piece
STALL_S = 60.0  # longer than the timeout of any client in the tests
HOP_BY_HOP = {"connection", "keep-alive", "expect", "transfer-encoding"}
MAX_BODY = 1 << 30


class Cut(Exception):
    """Raised to end a body early."""


class S3FaultProxy(ThreadedProxy):
    """An HTTP proxy in a thread.

    Args:
        target: address of S3.
        rate: share of the requests that get a fault.
        seed: of the random choice of requests and faults.
    """

    def __init__(self, port: int, target: str, *, rate: float, seed: int, faults: tuple[str, ...] = FAULTS) -> None:
        super().__init__(port)
        self.rate = rate
        self.counts: Counter[str] = Counter()
        self.num_requests = 0
        self.unanswered_puts: set[str] = set()
        """Paths of writes whose response was dropped: S3 may still carry them out later."""
        self._target = URL(target)
        self._faults = faults
        self._rng = random.Random(seed)

    @property
    def endpoint_url(self) -> str:
        """Address for clients."""
        return f"http://127.0.0.1:{self.port}"

    async def _begin(self) -> None:
        self._session = ClientSession(
            auto_decompress=False, connector=TCPConnector(limit=0), timeout=ClientTimeout(total=STALL_S)
        )
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _end(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.num_requests += 1
        body = await request.read()
        fault = self._rng.choice(self._faults) if self._rng.random() < self.rate else ""
        fault = fault if self._is_applicable(fault, request, body) else ""
        if fault:
            self.counts[fault] += 1
        is_answered = False
        try:
            response = await self._inject(request, body, fault)
            is_answered = True
            return response
        except (Cut, ClientError, OSError):
            _drop(request)
            return web.Response(status=502)  # nothing reads the result
        finally:
            if request.method == "PUT" and not is_answered:
                self.unanswered_puts.add(request.path)

    @staticmethod
    def _is_applicable(fault: str, request: web.Request, body: bytes) -> bool:
        if fault in ("cut going up", "flipped going up"):
            return len(body) > 1 and request.method == "PUT"
        if fault in ("cut coming down", "flipped coming down"):
            return request.method == "GET" and not request.query_string
        return True

    async def _inject(self, request: web.Request, body: bytes, fault: str) -> web.StreamResponse:
        rng = self._rng
        match fault:
            case "reset":
                raise Cut
            case "slow down":
                return _refusal(503, "SlowDown", "Please reduce your request rate.")
            case "error 500":
                return _refusal(500, "InternalError", "We encountered an internal error. Please try again.")
            case "bad gateway":
                return web.Response(status=502, text="<html><body>Bad Gateway</body></html>", content_type="text/html")
            case "stall":
                if rng.random() < 0.5:
                    await self._forward(request, body)
                await asyncio.sleep(STALL_S)
                raise Cut
            case "response lost":
                await self._forward(request, body)
                raise Cut
            case "cut going up":
                end = rng.randrange(1, len(body))
                await self._forward(request, body, cut_at=end)
                raise Cut
            case "flipped going up":
                return await self._respond(request, *await self._forward(request, flipped(body, rng)))
        status, headers, data = await self._forward(request, body)
        if fault == "flipped coming down" and status < 300 and data:
            data = flipped(data, rng)
        return await self._respond(request, status, headers, data, fault)

    async def _forward(
        self, request: web.Request, body: bytes, *, cut_at: int | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        url = self._target.join(URL(request.raw_path, encoded=True))
        data = _in_pieces(body, cut_at) if body else None
        skipped = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
        async with self._session.request(
            request.method, url, headers=headers, data=data, skip_auto_headers=skipped, allow_redirects=False
        ) as response:
            return response.status, dict(response.headers), await response.read()

    async def _respond(
        self, request: web.Request, status: int, headers: Mapping[str, str], data: bytes, fault: str = ""
    ) -> web.StreamResponse:
        kept = {k: v for k, v in headers.items() if k.lower() not in HOP_BY_HOP}
        response = web.StreamResponse(status=status, headers=kept)
        await response.prepare(request)
        if fault == "cut coming down":
            await response.write(data[: self._rng.randrange(len(data) + 1)])
            raise Cut
        if fault == "slow":
            step = max(1, len(data) // PIECES)
            for start in range(0, len(data), step):
                await asyncio.sleep(SLOW_S)
                await response.write(data[start : start + step])
        elif data:
            await response.write(data)
        await response.write_eof()
        return response


def flipped(data: bytes, rng: random.Random) -> bytes:
    """The data with one bit changed."""
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


async def _in_pieces(body: bytes, cut_at: int | None) -> AsyncIterator[bytes]:
    end = len(body) if cut_at is None else cut_at
    for start in range(0, end, PIECE_BYTES):
        yield body[start : min(end, start + PIECE_BYTES)]
    if cut_at is not None:
        await asyncio.sleep(SLOW_S)
        raise Cut


def _drop(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _refusal(status: int, code: str, message: str) -> web.Response:
    text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")
