"""Esper's loggers: structlog's interface with a final processor that queues the entry.

Without ``configure_logging``, as when Esper is a library in another program, each entry goes to
standard logging as one masked line, for that program's handlers. Invariant: logging never raises.
"""

import logging
import sys
import time
import traceback
from collections.abc import MutableMapping
from typing import Any, cast

import structlog
from structlog.contextvars import merge_contextvars
from structlog.stdlib import BoundLogger, filter_by_level

from esper.logging.field_values import CONSTANTS, redact, snapshot
from esper.logging.log_entry import LogEntry
from esper.logging.writer_thread import LogWriter
from esper.redaction import mask_text

_LEVELS = {"exception": "error", "warn": "warning", "fatal": "critical"}

writer: LogWriter | None = None
"""This process's writer. ``configure_logging`` sets it; until then it is None."""


def get_logger(name: str) -> BoundLogger:
    """A logger. The first argument of its methods is a stable event name; the others are fields."""
    wrapped = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[filter_by_level, merge_contextvars, _queue_entry],
        wrapper_class=BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return cast(BoundLogger, wrapped)


def capture_traceback(exc_info: Any) -> traceback.TracebackException | None:
    """The exception, ready to be formatted later; it keeps no frames, which would keep their locals alive."""
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    elif exc_info and not isinstance(exc_info, tuple):
        exc_info = sys.exc_info()
    if not exc_info or exc_info[1] is None:
        return None
    return traceback.TracebackException(*exc_info, lookup_lines=False, compact=True)


def _queue_entry(logger: logging.Logger, method: str, event: MutableMapping[str, Any]) -> Any:
    if writer is None:
        return _standard_logging_line(event)
    try:
        writer.put(_entry(logger.name, method, event))
    except Exception as error:  # raised by a value's own methods
        writer.put(LogEntry(time.time(), "error", logger.name, "log.entry_failed", {"error": type(error).__name__}))
    raise structlog.DropEvent


def _entry(name: str, method: str, event: MutableMapping[str, Any]) -> LogEntry:
    message = event.pop("event", None)
    positional = event.pop("positional_args", None)
    exc_info = event.pop("exc_info", None)
    fields = {k: v if type(v) in CONSTANTS else snapshot(v) for k, v in event.items()}
    return LogEntry(
        time.time(),
        _LEVELS.get(method, method),
        name,
        snapshot(message % positional if positional else message),
        fields,
        capture_traceback(exc_info) if exc_info else None,
    )


def _standard_logging_line(event: MutableMapping[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    try:
        entry = _entry("", "", event)
        parts = [str(redact(entry.event)), *(f"{k}={redact(v, k)!r}" for k, v in entry.fields.items())]
        error = f"\n{mask_text(''.join(entry.error.format()))}" if entry.error else ""
        line = " ".join(parts) + error
    except Exception as error:
        line = f"log.entry_failed error={type(error).__name__}"
    return ("%s", line), {"exc_info": False}
