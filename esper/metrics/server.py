"""Serves metrics and health checks over HTTP, on a separate port and on separate threads.

Paths: ``/metrics``; ``/healthz``, which is 503 if the process hangs; ``/readyz``, which is 503 with the
reasons as JSON if it is not ready. There is no password: the responses hold topic names and counts,
never data. The server listens on 127.0.0.1 unless the settings name another address.
"""

import errno
import json
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

from esper.errors import ConfigError
from esper.metrics import client_metrics
from esper.metrics.meter import Meter
from esper.metrics.readiness import Health
from esper.metrics.settings import MetricsAddress

IDLE_CLIENT_S = 10.0  # without a byte from a client; then its connection is closed

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class MetricsServer:
    """Serves the metrics of a registry and the health checks of a process, from ``start`` to ``stop``."""

    def __init__(self, registry: CollectorRegistry, health: Health) -> None:
        self._health = health
        self._metrics: Any = make_wsgi_app(registry)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        ProcessCollector(registry=registry)  # process_*: CPU, memory, open files

    def start(self, address: MetricsAddress) -> int:
        """Start serving; returns the port.

        Raises:
            ConfigError: the port is in use, or this process may not open it.
        """
        try:
            self._server = _Server((address.host, address.port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(_start_error(address, error)) from error
        self._server.set_app(self._respond)
        self._thread = threading.Thread(target=self._server.serve_forever, name="esper-metrics", daemon=True)
        self._thread.start()
        return int(self._server.server_port)

    def stop(self) -> None:
        """Stop serving; does nothing if the server was not started."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = None

    def _respond(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/metrics":
                response: Iterable[bytes] = self._metrics(environ, start_response)
                return response
            case "/healthz":
                is_live = self._health.is_live
                return _json(start_response, is_live, {"status": "live" if is_live else "hung"})
            case "/readyz":
                problems = [p.to_dict() for p in self._health.problems()]
                body = {"status": "not ready" if problems else "ready", "problems": problems}
                return _json(start_response, not problems, body)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"/metrics, /healthz, /readyz\n"]


class ProcessMetrics:
    """Base of each process's metrics: its meter with the metrics that all processes share, and their server.

    Args:
        process: name of the process, shown by ``esper_build_info``.
        health: state behind ``/healthz`` and ``/readyz``.
    """

    def __init__(self, process: str, health: Health) -> None:
        self.health = health
        self.meter = Meter()
        client_metrics.show_build(self.meter, process)
        self.meter.include(client_metrics.METER)
        self._server = MetricsServer(self.meter.registry, health)

    def serve(self, address: MetricsAddress) -> int:
        """Start serving; returns the port.

        Raises:
            ConfigError: the port is in use, or this process may not open it.
        """
        return self._server.start(address)

    def stop(self) -> None:
        """Stop serving; does nothing if ``serve`` was not called."""
        self._server.stop()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64


class _Handler(WSGIRequestHandler):
    timeout = IDLE_CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a line per scrape would fill the log."""


def _json(start_response: StartResponse, is_good: bool, body: dict[str, Any]) -> list[bytes]:
    status = "200 OK" if is_good else "503 Service Unavailable"
    start_response(status, [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
    return [json.dumps(body).encode() + b"\n"]


def _start_error(address: MetricsAddress, error: Exception) -> str:
    is_in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    cause = "another process uses this port" if is_in_use else error
    return (
        f"metrics cannot be served at {address.host}:{address.port}: {cause}; "
        f"set {address.setting} to another port, or to 0 for a free one"
    )
