"""Structured logs: stable event names with fields, written off the caller's thread.

Secrets never reach the output: a field whose name says that it is one is masked, at any
depth, and so are passwords inside URLs.
"""

import atexit
import logging
import logging.handlers
import queue
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

from esper.config import LoggingSettings

MASK = "***"
_SECRET_NAME = re.compile(r"(pass(word|wd)?|secret|token|credential|api[_-]?key|access[_-]?key|authorization)", re.I)
_URL_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^/\s:@]*:)[^@/\s]+(?=@)", re.I)
_QUEUE_SIZE = 10_000  # log lines waiting for the writer; beyond it the oldest caller blocks

_listener: logging.handlers.QueueListener | None = None


def redact(value: Any, name: str = "") -> Any:
    """``value`` with everything masked that is, or holds, a secret."""
    if name and _SECRET_NAME.search(name) and value is not None and not isinstance(value, bool):
        return MASK
    if isinstance(value, str):
        return _URL_PASSWORD.sub(rf"\g<head>{MASK}", value)
    if isinstance(value, Mapping):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redact(v) for v in value]
    return value


def _redact_fields(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {k: redact(v, k) for k, v in fields.items()}


def configure_logging(settings: LoggingSettings) -> None:
    """Set structlog and the standard logging up for this process. Called once, by its entry point."""
    global _listener
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_fields,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler(sys.__stderr__)  # Faust puts a proxy to logging in place of stderr
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_QUEUE_SIZE)
    if _listener is not None:
        _listener.stop()
    _listener = logging.handlers.QueueListener(lines, handler, respect_handler_level=True)
    _listener.start()
    atexit.register(_stop_listener)
    root = logging.getLogger()
    root.handlers = [_PlainQueueHandler(lines)]
    root.setLevel(settings.level)
    for chatty in ("aiokafka", "botocore", "aiobotocore", "urllib3", "asyncio", "yoyo"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; its first argument is a stable event name, the rest are fields."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


class _PlainQueueHandler(logging.handlers.QueueHandler):
    """Hands the record on as it is: structlog's event dict must reach the formatter whole."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


def _stop_listener() -> None:
    global _listener
    if _listener is not None:
        _listener.stop()
        _listener = None
