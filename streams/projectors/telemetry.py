"""telemetry.seed.health -> health_windows: tumbling windows of WINDOW_STEPS steps.

Invariant: the bits of a sum do not depend on how the log was cut into batches, since records are added one by one in
log order, starting from the stored row. A window whose steps lie beyond every projected step of its incarnation is
new, and is inserted by COPY. Other windows are updated; those of layers that are not in the cache are read first.
``late_health`` inserts late (redriven) signals as separate rows.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any, cast

from esper.graph.health_windows import COLUMNS, FIELDS, WINDOW_STEPS, add_signal, new_sums
from esper.schemas.events import LayerHealthMeasured
from esper.streams.database.connection_types import Connection
from esper.streams.database.health_window_partitions import TABLE, make_partitions
from esper.streams.database.sql_queries import queries
from esper.streams.projectors import late_health
from esper.streams.projectors.health_report_decoder import HealthReport
from esper.streams.projectors.projected_event import ProjectedEvent
from esper.streams.worker.partition_cache import LayerKey, OpenWindow, PartitionCache

KEY_COLUMNS = ("run_id", "incarnation", "step", "layer_id", "seed_id")
COPIED_COLUMNS = (*KEY_COLUMNS, "logged_at", "log_partition", "first_offset", *COLUMNS)

Report = HealthReport | LayerHealthMeasured
"""Both decoders give the same attributes."""

ChangedWindows = dict[LayerKey, dict[int, OpenWindow]]


async def project(connection: Connection, batch: Sequence[ProjectedEvent], cache: PartitionCache) -> None:
    """Add the reports of one partition to their windows, in order."""
    late = [p for p in batch if p.late_from]
    if late:
        await late_health.project(connection, late)
        batch = [p for p in batch if not p.late_from]
    reports = cast("Sequence[Report]", [projected.data for projected in batch])
    await _read_windows(connection, reports, cache)
    changed = _add_signals(batch, reports, cache)
    new: list[tuple[LayerKey, int, OpenWindow]] = []
    stored: list[tuple[LayerKey, int, OpenWindow]] = []
    for key, windows in changed.items():
        for seed_id, window in windows.items():
            (stored if window.is_stored else new).append((key, seed_id, window))
    if new:
        await make_partitions(connection, {window.logged_at.date() for _key, _seed_id, window in new})
        rows = [(*key, seed_id, w.logged_at, w.log_partition, w.first_offset, *w.sums) for key, seed_id, w in new]
        await connection.copy_records_to_table(TABLE, records=rows, columns=COPIED_COLUMNS)
    if stored:
        await _update_windows(connection, [(*key, seed_id, w.logged_at, *w.sums) for key, seed_id, w in stored])
    for _key, _seed_id, window in new:
        window.is_stored = True


async def _read_windows(connection: Connection, reports: Sequence[Report], cache: PartitionCache) -> None:
    """Read the windows of each layer that may have stored ones and is not in the cache."""
    wanted: dict[LayerKey, None] = {}
    for report in reports:
        step = report.step - report.step % WINDOW_STEPS
        if step > cache.progress[report.run_id, report.incarnation].last_step:
            continue
        key = (report.run_id, report.incarnation, step, report.layer_id)
        if key not in cache.layers:
            wanted[key] = None
    if not wanted:
        return
    run_ids, incarnations, steps, layer_ids = (list(column) for column in zip(*wanted, strict=True))
    found = queries("telemetry").windows_of(
        connection, run_ids=run_ids, incarnations=incarnations, steps=steps, layer_ids=layer_ids
    )
    cache.layers.update({key: {} for key in wanted})
    async for row in found:
        values = tuple(row)
        logged_at, partition, offset = values[5:8]
        window = OpenWindow(list(values[8:]), logged_at, partition, offset, is_stored=True)
        cache.layers[values[:4]][values[4]] = window


def _add_signals(batch: Sequence[ProjectedEvent], reports: Sequence[Report], cache: PartitionCache) -> ChangedWindows:
    """Add every signal to its window; returns the changed windows."""
    layers, changed = cache.layers, ChangedWindows()
    for projected, report in zip(batch, reports, strict=True):
        run_id, incarnation, step = report.run_id, report.incarnation, report.step
        key = (run_id, incarnation, step - step % WINDOW_STEPS, report.layer_id)
        windows = layers.get(key)
        if windows is None:
            windows = layers[key] = {}
        if key not in changed:
            changed[key] = {}
        layer_windows = changed[key]
        for signal in report.signals:
            seed_id = signal.seed_id
            window = windows.get(seed_id)
            if window is None:
                window = windows[seed_id] = _new_window(projected)
            layer_windows[seed_id] = window
            add_signal(window.sums, signal)
        progress = cache.progress[run_id, incarnation]
        if step > progress.last_step:
            progress.last_step = step
    return changed


def _new_window(first: ProjectedEvent) -> OpenWindow:
    """A window that starts with this record."""
    logged_at = datetime.fromtimestamp(first.logged_ms / 1000, UTC)
    return OpenWindow(new_sums(), logged_at, first.position.partition, first.position.offset, is_stored=False)


async def _update_windows(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    names: Iterable[str] = chain(
        ("run_ids", "incarnations", "steps", "layer_ids", "seed_ids", "logged_ats", "num_signals", "num_non_finites"),
        (f"sums_{n}" for n in range(len(FIELDS))),
        (f"counts_{n}" for n in range(len(FIELDS))),
    )
    columns = {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    await queries("telemetry").update_windows(connection, **columns)
