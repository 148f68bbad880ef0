"""Structured logs: stable event names with fields, written by a background thread.

A log call costs its caller a few microseconds: it copies mutable values and puts them on a queue.
The writer thread does the expensive work: masking, tracebacks, formatting, writing. Secrets never
reach the output; ``esper.redaction`` recognizes them by name, by shape and by value. A log that
cannot be written never stops or slows a training step: lines are dropped and counted, and
``log.lost`` logs the count.

Public names:

- ``configure_logging`` sets up a process, and ``flush_logging`` waits until its lines are written;
  ``install_crash_hooks`` masks secrets in uncaught exceptions.
- ``get_logger`` returns a logger: ``log.info("noun.verb_past", field=value)``.
- ``traced`` adds a trace id to all lines of a block; ``incoming_trace`` and ``trace_id_of`` read
  W3C ``traceparent`` headers.
- ``redact`` masks the secrets in a value, and ``MASK`` is what replaces them.
"""

from esper.logging.field_values import redact
from esper.logging.logger_factory import get_logger
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
