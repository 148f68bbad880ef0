"""Structured logs: stable event names with fields, written off the caller's thread.

A call costs its caller some microseconds: it takes a copy of what can change and puts it on a
queue. Everything dear (secrets, tracebacks, text, the write) happens on the writer's thread.
Secrets never reach the output; ``esper.redaction`` knows them by name, by shape and by value. A log
that cannot be written never stops or slows a training step: lines are dropped, counted, and the
count is logged (``log.lost``).
"""

from esper.logging.field_values import redact
from esper.logging.loggers import get_logger
from esper.logging.setup import configure_logging, flush_logging, install_crash_hooks
from esper.logging.trace_context import incoming_trace, trace_id_of, traced
from esper.redaction import MASK

__all__ = [
    "MASK",
    "configure_logging",
    "flush_logging",
    "get_logger",
    "incoming_trace",
    "install_crash_hooks",
    "redact",
    "trace_id_of",
    "traced",
]
