"""What Urza shows to Prometheus: its API by route and status, and what it waits for.

A route is the API's own pattern (``/runs/{run_id}``), never the address that was asked for.
"""

import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import cache
from re import Pattern
from typing import Any

from starlette.routing import compile_path

from esper.logging import incoming_trace, traced
from esper.metrics import Health, Kind, Meter, MetricsServer, Problem, ProcessMetrics, client_metrics

NO_ROUTE = "none"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BROKEN_OFF = 499  # what proxies say of a client that left before its answer
NOT_COMPLETE = "Kafka, Postgres or S3 is away, or the catalogue is not complete yet"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class UrzaMetrics(ProcessMetrics):
    """The metrics of one library.

    Args:
        is_ready: whether everything that the library needs is there.
    """

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._num_open = 0
        self.health = Health(lambda: [] if is_ready() else [Problem(NOT_COMPLETE)])
        self.meter = self._make_meter()
        self._server = MetricsServer(self.meter.registry, self.health)

    def _make_meter(self) -> Meter:
        meter = Meter()
        client_metrics.show_build(meter, "urza")
        self._requests = meter.histogram(
            "esper_urza_request_seconds",
            "From a request to the last byte of its answer.",
            "route",
            "method",
            "status",
        )
        meter.probe(Kind.GAUGE, "esper_urza_requests_in_flight", "Requests being answered.", lambda: self._num_open)
        meter.include(client_metrics.METER)
        return meter

    def wrap_app(self, app: AsgiApp) -> AsgiApp:
        """The API, with each request timed, and its log lines in the trace that the caller named."""

        patterns = cache(lambda: _patterns(app))

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began, status = time.perf_counter(), BROKEN_OFF

            async def noting(message: MutableMapping[str, Any]) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            self._num_open += 1
            try:
                with traced(incoming_trace(_header(scope, b"traceparent"))):
                    await app(scope, receive, noting)
            except Exception:
                status = 500
                raise
            finally:
                self._num_open -= 1
                route = _route(scope, patterns())
                method = scope["method"] if scope["method"] in METHODS else NO_ROUTE
                self._requests.labels(route, method, str(status)).observe(time.perf_counter() - began)

        return answer


def _route(scope: Scope, patterns: Sequence[tuple[Pattern[str], str]]) -> str:
    """The pattern of an address. An answer that is kept never comes as far as its route: it is looked up here then."""
    if "route" in scope:
        return str(getattr(scope["route"], "path", NO_ROUTE))
    return next((path for pattern, path in patterns if pattern.match(scope["path"])), NO_ROUTE)


def _patterns(app: AsgiApp) -> list[tuple[Pattern[str], str]]:
    """The API's paths; those without parameters first, as they would be found."""
    openapi = getattr(app, "openapi", None)
    paths = sorted(openapi()["paths"], key=lambda path: (path.count("{"), path)) if openapi else []
    return [(compile_path(path)[0], path) for path in paths]


def _header(scope: Scope, name: bytes) -> str | None:
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None
