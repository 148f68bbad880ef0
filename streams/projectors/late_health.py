"""telemetry.seed.health, redriven -> late_health_signals.

A window must not change after a view has read it. So signals that are redriven after later ones of their incarnation
were projected get separate rows, which count only in views of later boundaries.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from esper.graph.health_windows import FIELDS, WINDOW_STEPS
from esper.schemas.events import LayerHealthMeasured
from esper.schemas.operational import HealthSignal
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries
from esper.streams.projectors.batched_inserts import write_rows
from esper.streams.projectors.health_report_decoder import HealthReport, Signal
from esper.streams.projectors.projected_event import ProjectedEvent


async def project(connection: Connection, batch: Sequence[ProjectedEvent]) -> None:
    """Insert late signals."""
    await write_rows(connection, queries("telemetry"), "insert_late_signals", list(_rows(batch)))


def _rows(batch: Sequence[ProjectedEvent]) -> Iterator[dict[str, Any]]:
    for projected in batch:
        report = projected.data
        assert isinstance(report, HealthReport | LayerHealthMeasured)
        signals: Sequence[Signal | HealthSignal] = report.signals
        for index, signal in enumerate(signals):
            yield {
                "run_id": report.run_id,
                "incarnation": report.incarnation,
                "step": report.step - report.step % WINDOW_STEPS,
                "log_partition": projected.position.partition,
                "log_offset": projected.position.offset,
                "place": index,
                "logged_at": datetime.fromtimestamp(projected.logged_ms / 1000, UTC),
                "late_from": projected.late_from,
                "layer_id": report.layer_id,
                "seed_id": signal.seed_id,
                "non_finite": signal.non_finite,
                **{name: getattr(signal, name) for name in FIELDS},
            }
