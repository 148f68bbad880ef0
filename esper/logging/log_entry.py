"""One log entry, and the line that it becomes.

Owns the names of the fields that every line has. Invariant: a line ends with its only newline
where the format is json, and holds no secret in any format.
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
    """What a call leaves for the writer. ``fields`` hold snapshots alone."""

    created_s: float
    level: str
    logger: str
    event: Any
    fields: Mapping[str, Any]
    error: traceback.TracebackException | None = None


class LineRenderer:
    """Makes the line of an entry, on the writer's thread."""

    def __init__(self, settings: LoggingSettings, *, has_colors: bool) -> None:
        # rich's tracebacks, structlog's default, print local variables
        console = structlog.dev.ConsoleRenderer(
            colors=has_colors, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
        )
        self._console = None if settings.format == "json" else console

    def __call__(self, entry: LogEntry) -> str:
        """The line, with its newline."""
        try:
            shown = _shown(entry)
            line = json.dumps(shown) if self._console is None else str(self._console(None, entry.level, shown))
        except Exception as error:  # a line is worth more than none
            named = {"event": "log.render_failed", "logger": entry.logger, "error": type(error).__name__}
            line = json.dumps(named)
        return mask_values(line) + "\n"


def _shown(entry: LogEntry) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "timestamp": datetime.fromtimestamp(entry.created_s, UTC).isoformat(timespec="microseconds")[:-6] + "Z",
        "level": entry.level,
        "logger": entry.logger,
        "event": mask_snapshot(entry.event),
    }
    for name, value in entry.fields.items():
        shown[f"{name}_" if name in shown else name] = mask_snapshot(value, name)
    if entry.error is not None:
        shown["exception"] = masked_text("".join(entry.error.format()).rstrip())
    return shown
