"""The trace of a log line, by W3C Trace Context: ``traceparent`` in events and in HTTP headers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from structlog.contextvars import bound_contextvars

from esper.schemas.messages import TRACEPARENT_PATTERN

_TRACEPARENT = re.compile(TRACEPARENT_PATTERN)
_NO_TRACE = "0" * 32
_NO_SPAN = "0" * 16


def incoming_trace(header: str | None) -> str | None:
    """The ``traceparent`` that a caller sent, for ``OonaMessage.of``; None if it is absent or invalid.

    As the specification requires, an invalid one is ignored, and the event begins a new trace.
    """
    text = (header or "").strip()
    if not _TRACEPARENT.fullmatch(text):
        return None
    _version, trace, span, _flags = text.split("-")
    return None if trace == _NO_TRACE or span == _NO_SPAN else text


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace id in a ``traceparent``: the part that all events of one trace share."""
    return traceparent.split("-")[1] if traceparent else None


@contextmanager
def traced(traceparent: str | None) -> Iterator[None]:
    """Add the ``trace_id`` to all log lines of this block, in this task or thread."""
    trace_id = trace_id_of(traceparent)
    with bound_contextvars(**({} if trace_id is None else {"trace_id": trace_id})):
        yield
