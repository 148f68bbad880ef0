"""Structured logs: stable event names with fields, written off the caller's thread.

A call costs its caller some microseconds: it takes a copy of what can change and puts it on a
queue. Everything dear (secrets, tracebacks, text, the write) happens on the writer's thread.
Secrets never reach the output; ``esper.masking`` knows them by name, by shape and by value. A log
that cannot be written never stops or slows a training step: lines are dropped, counted, and the
count is logged (``log.lost``).
"""

from esper.logging.process import configure_logging, flush_logging, install_crash_hooks
from esper.logging.structured import get_logger
from esper.logging.tracing import incoming_trace, trace_id_of, traced
from esper.logging.values import redact
from esper.masking import MASK

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
