"""MetricsServer: answers Prometheus and whoever watches over the process, on a port and threads of its own.

Paths: ``/metrics``, ``/healthz`` (503 where the process hangs), ``/readyz`` (503 with the reasons as JSON). It has no
password: it shows names of topics and counts, never data, and listens on 127.0.0.1 unless the settings say otherwise.
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
from esper.metrics.readiness import Health
from esper.metrics.settings import MetricsAddress

IDLE_CLIENT_S = 10.0  # a client that says nothing for so long is hung up on

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class MetricsServer:
    """Serves a registry and a health. ``start`` it, ``stop`` it."""

    def __init__(self, registry: CollectorRegistry, health: Health) -> None:
        self._health = health
        self._metrics: Any = make_wsgi_app(registry)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        ProcessCollector(registry=registry)  # process_*: CPU, memory, open files

    def start(self, address: MetricsAddress) -> int:
        """Begin to answer; gives the port.

        Raises:
            ConfigError: the port is taken, or this process may not open it.
        """
        try:
            self._server = _Server((address.host, address.port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(_refused(address, error)) from error
        self._server.set_app(self._answer)
        self._thread = threading.Thread(target=self._server.serve_forever, name="esper-metrics", daemon=True)
        self._thread.start()
        return int(self._server.server_port)

    def stop(self) -> None:
        """Answer no more. Fine where it was not started."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = None

    def _answer(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/metrics":
                answer: Iterable[bytes] = self._metrics(environ, start_response)
                return answer
            case "/healthz":
                is_live = self._health.is_live
                return _json(start_response, is_live, {"status": "live" if is_live else "hung"})
            case "/readyz":
                problems = [p.to_dict() for p in self._health.problems()]
                told = {"status": "not ready" if problems else "ready", "problems": problems}
                return _json(start_response, not problems, told)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"/metrics, /healthz, /readyz\n"]


class ProcessMetrics:
    """What the metrics of every process have in common: ``_server`` shows its meter and its health."""

    _server: MetricsServer

    def serve(self, address: MetricsAddress) -> int:
        """Start answering; gives the port.

        Raises:
            ConfigError: the port cannot be had.
        """
        return self._server.start(address)

    def stop(self) -> None:
        """Stop answering."""
        self._server.stop()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64


class _Handler(WSGIRequestHandler):
    timeout = IDLE_CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line."""


def _json(start_response: StartResponse, is_good: bool, body: dict[str, Any]) -> list[bytes]:
    status = "200 OK" if is_good else "503 Service Unavailable"
    start_response(status, [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
    return [json.dumps(body).encode() + b"\n"]


def _refused(address: MetricsAddress, error: Exception) -> str:
    where, todo = f"{address.host}:{address.port}", f"choose another with {address.setting}, or 0 for a free one"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"metrics cannot be served at {where}: another process has this port; {todo}"
    return f"metrics cannot be served at {where}: {error}; {todo}"
