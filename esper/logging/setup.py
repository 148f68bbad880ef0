"""Set-up of a process's logging: done once by the entry point, flushed when the process ends.

This module owns the root logger and the hooks for uncaught exceptions. Invariant: everything that
the process prints through logging, warnings or a crash has its secrets masked.
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
from esper.logging import logger_factory
from esper.logging.field_values import redact, snapshot
from esper.logging.log_entry import LineRenderer, LogEntry
from esper.logging.logger_factory import capture_traceback
from esper.logging.writer_thread import FLUSH_TIMEOUT_S, FileDescriptorSink, LogWriter
from esper.redaction import mask_text

_VERBOSE_LIBRARIES = ("aiokafka", "botocore", "aiobotocore", "urllib3", "asyncio", "yoyo")


def configure_logging(settings: LoggingSettings) -> None:
    """Set up structlog and standard logging for this process, with lines to stderr.

    The entry point calls it. A second call replaces the first.
    """
    previous = logger_factory.writer
    stream = sys.__stderr__  # not sys.stderr, which Faust replaces with a proxy to logging
    has_colors = stream is not None and stream.isatty()
    logger_factory.writer = LogWriter(LineRenderer(settings, has_colors=has_colors), _stderr_sink())
    if previous is None:
        atexit.register(_close)
    else:
        previous.close()
    root = logging.getLogger()
    root.handlers = [_QueueHandler()]
    root.setLevel(settings.level)
    for name in _VERBOSE_LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    install_crash_hooks()


def flush_logging(deadline_s: float = FLUSH_TIMEOUT_S) -> bool:
    """Wait until all lines so far are written; False if that takes longer than ``deadline_s``."""
    return logger_factory.writer is None or logger_factory.writer.flush(deadline_s)


def install_crash_hooks() -> None:
    """Log uncaught exceptions of every thread, with their secrets masked."""
    sys.excepthook = _process_crashed
    threading.excepthook = _thread_crashed
    sys.unraisablehook = _finalizer_crashed


class _QueueHandler(logging.Handler):
    """Queues records of standard logging for the writer thread."""

    def emit(self, record: logging.LogRecord) -> None:
        if logger_factory.writer is None:
            return
        try:
            message = record.getMessage()
        except Exception:  # the arguments do not fit the message
            message = f"{record.msg} {redact(record.args)}"
        try:
            error = capture_traceback(record.exc_info)
        except Exception:
            error = None
        entry = LogEntry(record.created, record.levelname.lower(), record.name, snapshot(message), {}, error)
        logger_factory.writer.put(entry)


def _stderr_sink() -> Callable[[bytes], None]:
    try:
        return FileDescriptorSink(sys.__stderr__.fileno() if sys.__stderr__ else 2)
    except (OSError, ValueError):  # no descriptor, or a closed one: each write fails, and its lines count as lost
        return FileDescriptorSink(2)


def _close() -> None:
    if logger_factory.writer is not None:
        logger_factory.writer.close()


def _process_crashed(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, tb)
    else:
        _log_crash("process.crashed", (kind, error, tb))


def _thread_crashed(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else None
        _log_crash("thread.crashed", (args.exc_type, args.exc_value, args.exc_traceback), thread=name)


def _finalizer_crashed(args: Any) -> None:
    _log_crash("finalizer.crashed", (args.exc_type, args.exc_value, args.exc_traceback), object=args.object)


def _log_crash(event: str, exc_info: Any, **fields: Any) -> None:
    try:
        error = capture_traceback(exc_info)
        if logger_factory.writer is not None:
            copied = {name: snapshot(value) for name, value in fields.items()}
            logger_factory.writer.put(LogEntry(time.time(), "critical", "esper", event, copied, error))
            logger_factory.writer.flush()
        elif error is not None:
            _stderr_sink()(mask_text("".join(error.format())).encode(errors="backslashreplace"))
    except Exception:  # the last resort: Python's own traceback could print secrets
        sys.stderr.write(f"{event}: {exc_info[0].__name__}\n")
