"""telemetry.seed.health, redriven -> late_health_windows.

A window that a view was made of must not change afterwards. So signals that come when later ones of their
incarnation were folded are added up beside it, and count in views of boundaries that came after them alone.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from esper.graph.windows import FIELDS, WINDOW_STEPS
from esper.schemas.events import LayerHealthMeasured
from esper.streams.projected import Projected
from esper.streams.queries import queries


async def project(connection: Any, batch: Sequence[Projected]) -> None:
    """Add late signals to their windows, one by one in the order of the log."""
    await queries("telemetry").add_late_signal(connection, list(_rows(batch)))


def _rows(batch: Sequence[Projected]) -> Iterator[dict[str, Any]]:
    for projected in batch:
        report = projected.data
        assert isinstance(report, LayerHealthMeasured), "a redriven record is read the long way"
        for signal in report.signals:
            values = {name: getattr(signal, name) for name in FIELDS}
            yield {
                "run_id": report.run_id,
                "incarnation": report.incarnation,
                "step": report.step - report.step % WINDOW_STEPS,
                "layer_id": report.layer_id,
                "seed_id": signal.seed_id,
                "late_from": projected.late_from,
                "logged_at": datetime.fromtimestamp(projected.logged_ms / 1000, UTC),
                "log_partition": projected.position.partition,
                "first_offset": projected.position.offset,
                "num_non_finite": int(signal.non_finite),
                **{f"sum_{name}": value or 0.0 for name, value in values.items()},
                **{f"count_{name}": int(value is not None) for name, value in values.items()},
            }
