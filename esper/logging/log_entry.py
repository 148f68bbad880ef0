"""A log entry, and its rendering as a line.

This module owns the names of the fields that every line has. Invariant: a line holds no secret, and
a JSON line has exactly one newline, at its end.
"""

import json
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog

from esper.config import LoggingSettings
from esper.logging.field_values import mask_snapshot, masked_text
from esper.redaction import mask_values


class LogEntry(NamedTuple):
    """A log call as it is queued for the writer thread. ``fields`` hold snapshots only."""

    created_s: float
    level: str
    logger: str
    event: Any
    fields: Mapping[str, Any]
    error: traceback.TracebackException | None = None


class LineRenderer:
    """Renders entries as lines, on the writer thread."""

    def __init__(self, settings: LoggingSettings, *, has_colors: bool) -> None:
        # structlog's default, rich's tracebacks, prints local variables, which may hold secrets
        console = structlog.dev.ConsoleRenderer(
            colors=has_colors, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
        )
        self._console = None if settings.format == "json" else console

    def __call__(self, entry: LogEntry) -> str:
        """The line of an entry, including the newline."""
        try:
            fields = _line_fields(entry)
            line = json.dumps(fields) if self._console is None else str(self._console(None, entry.level, fields))
        except Exception as error:  # an incomplete line is better than none
            minimal = {"event": "log.render_failed", "logger": entry.logger, "error": type(error).__name__}
            line = json.dumps(minimal)
        return mask_values(line) + "\n"


def _line_fields(entry: LogEntry) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "timestamp": datetime.fromtimestamp(entry.created_s, UTC).isoformat(timespec="microseconds")[:-6] + "Z",
        "level": entry.level,
        "logger": entry.logger,
        "event": mask_snapshot(entry.event),
    }
    for name, value in entry.fields.items():
        fields[f"{name}_" if name in fields else name] = mask_snapshot(value, name)
    if entry.error is not None:
        fields["exception"] = masked_text("".join(entry.error.format()).rstrip())
    return fields
