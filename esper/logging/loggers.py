"""Esper's own loggers: structlog's interface, and a last processor that hands the entry over.

Before ``configure_logging`` (Esper as a library in somebody's program) entries go to the standard
logging as one masked line, to that program's own handlers. Invariant: logging never raises.
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
"""This process's writer; None until ``configure_logging``, which alone sets it."""


def get_logger(name: str) -> BoundLogger:
    """A logger; its first argument is a stable event name, the rest are fields."""
    wrapped = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[filter_by_level, merge_contextvars, _hand_over],
        wrapper_class=BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return cast(BoundLogger, wrapped)


def captured(exc_info: Any) -> traceback.TracebackException | None:
    """What of an exception can be formatted later, without its frames: they would keep their locals alive."""
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    elif exc_info and not isinstance(exc_info, tuple):
        exc_info = sys.exc_info()
    if not exc_info or exc_info[1] is None:
        return None
    return traceback.TracebackException(*exc_info, lookup_lines=False, compact=True)


def _hand_over(logger: logging.Logger, method: str, event: MutableMapping[str, Any]) -> Any:
    if writer is None:
        return _for_standard_logging(event)
    try:
        writer.put(_entry(logger.name, method, event))
    except Exception as error:  # a value's own code failed
        writer.put(LogEntry(time.time(), "error", logger.name, "log.entry_failed", {"error": type(error).__name__}))
    raise structlog.DropEvent


def _entry(name: str, method: str, event: MutableMapping[str, Any]) -> LogEntry:
    said = event.pop("event", None)
    positional = event.pop("positional_args", None)
    exc_info = event.pop("exc_info", None)
    fields = {k: v if type(v) in CONSTANTS else snapshot(v) for k, v in event.items()}
    return LogEntry(
        time.time(),
        _LEVELS.get(method, method),
        name,
        snapshot(said % positional if positional else said),
        fields,
        captured(exc_info) if exc_info else None,
    )


def _for_standard_logging(event: MutableMapping[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    try:
        entry = _entry("", "", event)
        parts = [str(redact(entry.event)), *(f"{k}={redact(v, k)!r}" for k, v in entry.fields.items())]
        error = f"\n{mask_text(''.join(entry.error.format()))}" if entry.error else ""
        line = " ".join(parts) + error
    except Exception as error:
        line = f"log.entry_failed error={type(error).__name__}"
    return ("%s", line), {"exc_info": False}
