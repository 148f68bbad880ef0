"""Logging of a process: set up once by its entry point, flushed at its end, told of its crashes.

Owns the root logger and the hooks for exceptions that nobody catches. Invariant: whatever this
process prints through logging, warnings or a crash has gone through the masking.
"""

import atexit
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from esper.config import LoggingSettings
from esper.logging import loggers
from esper.logging.field_values import redact, snapshot
from esper.logging.log_entry import LineRenderer, LogEntry
from esper.logging.loggers import captured
from esper.logging.writer_thread import FLUSH_S, FileDescriptorSink, LogWriter
from esper.redaction import mask_text

_CHATTY = ("aiokafka", "botocore", "aiobotocore", "urllib3", "asyncio", "yoyo")


def configure_logging(settings: LoggingSettings) -> None:
    """Set structlog and the standard logging up for this process: lines to stderr, in the format asked for.

    Called by its entry point; a second call replaces the first.
    """
    before = loggers.writer
    stream = sys.__stderr__  # Faust puts a proxy to logging in place of stderr
    has_colors = stream is not None and stream.isatty()
    loggers.writer = LogWriter(LineRenderer(settings, has_colors=has_colors), _stderr_sink())
    if before is None:
        atexit.register(_close)
    else:
        before.close()
    root = logging.getLogger()
    root.handlers = [_HandOver()]
    root.setLevel(settings.level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    install_crash_hooks()


def flush_logging(deadline_s: float = FLUSH_S) -> bool:
    """Wait until all lines so far are written; False where that takes longer than ``deadline_s``."""
    return loggers.writer is None or loggers.writer.flush(deadline_s)


def install_crash_hooks() -> None:
    """Have exceptions that nobody catches told without secrets, in every thread."""
    sys.excepthook = _process_crashed
    threading.excepthook = _thread_crashed
    sys.unraisablehook = _finalizer_crashed


class _HandOver(logging.Handler):
    """Hands records of the standard logging to the writer."""

    def emit(self, record: logging.LogRecord) -> None:
        if loggers.writer is None:
            return
        try:
            said = record.getMessage()
        except Exception:  # the arguments do not fit the message
            said = f"{record.msg} {redact(record.args)}"
        try:
            error = captured(record.exc_info)
        except Exception:
            error = None
        entry = LogEntry(record.created, record.levelname.lower(), record.name, snapshot(said), {}, error)
        loggers.writer.put(entry)


def _stderr_sink() -> Callable[[bytes], None]:
    try:
        return FileDescriptorSink(sys.__stderr__.fileno() if sys.__stderr__ else 2)
    except (OSError, ValueError):  # a stream without a descriptor, or a closed one: each write will fail, and count
        return FileDescriptorSink(2)


def _close() -> None:
    if loggers.writer is not None:
        loggers.writer.close()


def _process_crashed(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, tb)
    else:
        _tell_crash("process.crashed", (kind, error, tb))


def _thread_crashed(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else None
        _tell_crash("thread.crashed", (args.exc_type, args.exc_value, args.exc_traceback), thread=name)


def _finalizer_crashed(args: Any) -> None:
    _tell_crash("finalizer.crashed", (args.exc_type, args.exc_value, args.exc_traceback), object=args.object)


def _tell_crash(event: str, exc_info: Any, **fields: Any) -> None:
    try:
        error = captured(exc_info)
        if loggers.writer is not None:
            copied = {name: snapshot(value) for name, value in fields.items()}
            loggers.writer.put(LogEntry(time.time(), "critical", "esper", event, copied, error))
            loggers.writer.flush()
        elif error is not None:
            _stderr_sink()(mask_text("".join(error.format())).encode(errors="backslashreplace"))
    except Exception:  # the last resort failed: what Python would print may hold secrets
        sys.stderr.write(f"{event}: {exc_info[0].__name__}\n")
