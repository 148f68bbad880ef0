"""Urza's metrics: requests by route and status, and readiness.

Invariant: the label of a route is its pattern (``/runs/{run_id}``), never a requested path, so labels are bounded.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from re import Pattern

from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.logging import incoming_trace, traced
from esper.metrics import Health, Kind, Problem, ProcessMetrics

NO_ROUTE = "none"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left before the response
NOT_READY = "Kafka, Postgres or S3 is unavailable, or the catalogue is incomplete; the log names the cause"


class UrzaMetrics(ProcessMetrics):
    """The metrics of one Urza.

    Args:
        is_ready: whether all dependencies answer and the catalogue is complete.
    """

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._num_in_flight = 0
        super().__init__("urza", Health(lambda: [] if is_ready() else [Problem(NOT_READY)]))
        self._requests = self.meter.histogram(
            "esper_urza_request_seconds",
            "Seconds from a request to the last byte of its response.",
            "route",
            "method",
            "status",
        )
        self.meter.probe(
            Kind.GAUGE, "esper_urza_requests_in_flight", "Requests in progress.", lambda: self._num_in_flight
        )

    def wrap_app(self, app: ASGIApp) -> ASGIApp:
        """The API with each request timed, and its log lines in the trace that the caller named."""
        patterns = cache(lambda: _patterns(app))

        async def timed_app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            start, status = time.perf_counter(), CLIENT_CLOSED_REQUEST

            async def record_status(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            self._num_in_flight += 1
            try:
                with traced(incoming_trace(_header(scope, b"traceparent"))):
                    await app(scope, receive, record_status)
            except Exception:
                status = 500
                raise
            finally:
                self._num_in_flight -= 1
                route = _route(scope, patterns())
                method = scope["method"] if scope["method"] in METHODS else NO_ROUTE
                self._requests.labels(route, method, str(status)).observe(time.perf_counter() - start)

        return timed_app


def _route(scope: Scope, patterns: Sequence[tuple[Pattern[str], str]]) -> str:
    """The pattern of a path. A cached response never reaches its route, so its pattern is looked up here."""
    if "route" in scope:
        return str(getattr(scope["route"], "path", NO_ROUTE))
    return next((path for pattern, path in patterns if pattern.match(scope["path"])), NO_ROUTE)


def _patterns(app: ASGIApp) -> list[tuple[Pattern[str], str]]:
    """The API's paths, in the order in which routes match: those without parameters first."""
    openapi = getattr(app, "openapi", None)
    paths = sorted(openapi()["paths"], key=lambda path: (path.count("{"), path)) if openapi else []
    return [(compile_path(path)[0], path) for path in paths]


def _header(scope: Scope, name: bytes) -> str | None:
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None
