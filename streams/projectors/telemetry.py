"""telemetry.seed.health -> health_windows: tumbling windows of WINDOW_STEPS steps.

Sums are added up one record at a time in the order of the log, starting from the stored row: so their bits do
not depend on how the log was cut into batches. A window is new, and goes in by COPY, where its steps lie beyond
every step that was folded of its incarnation; of the others those that are not remembered are read.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from esper.graph.windows import FIELDS, WINDOW_STEPS
from esper.schemas.events import LayerHealthMeasured
from esper.schemas.operational import HealthSignal
from esper.streams.health_partitions import TABLE, make_partitions
from esper.streams.health_reports import HealthReport, Signal
from esper.streams.memory import OpenWindow, PartitionMemory, WindowKey
from esper.streams.projected import Projected
from esper.streams.queries import queries

KEY_COLUMNS = ("run_id", "incarnation", "step", "layer_id", "seed_id")
SUM_COLUMNS = (
    "num_signals",
    "num_non_finite",
    *(f"sum_{name}" for name in FIELDS),
    *(f"count_{name}" for name in FIELDS),
)
COPIED = (*KEY_COLUMNS, "logged_at", "log_partition", "first_offset", *SUM_COLUMNS)

Grown = dict[WindowKey, OpenWindow]


async def project(connection: Any, batch: Sequence[Projected], memory: PartitionMemory) -> None:
    """Fold the reports of one partition, in their order."""
    await _recall(connection, batch, memory)
    grown = _add_up(batch, memory)
    new = {key: window for key, window in grown.items() if not window.is_stored}
    if new:
        await make_partitions(connection, {w.logged_at.date() for w in new.values()})
        rows = [(*key, w.logged_at, w.log_partition, w.first_offset, *w.sums) for key, w in new.items()]
        await connection.copy_records_to_table(TABLE, records=rows, columns=COPIED)
    await _grow(connection, {key: window for key, window in grown.items() if window.is_stored})
    for window in new.values():
        window.is_stored = True


async def _recall(connection: Any, batch: Sequence[Projected], memory: PartitionMemory) -> None:
    """Read the windows that may be stored and are not remembered."""
    wanted: dict[WindowKey, None] = {}
    for projected in batch:
        report = _report(projected)
        step = report.step - report.step % WINDOW_STEPS
        if step > memory.progress[report.run_id, report.incarnation].last_step:
            continue
        for signal in report.signals:
            key = (report.run_id, report.incarnation, step, report.layer_id, signal.seed_id)
            if key not in memory.windows:
                wanted[key] = None
    if not wanted:
        return
    columns = zip(*wanted, strict=True)
    names = ("run_ids", "incarnations", "steps", "layer_ids", "seed_ids")
    found = queries("telemetry").windows_of(connection, **{n: list(c) for n, c in zip(names, columns, strict=True)})
    async for row in found:
        values = tuple(row)
        logged_at, partition, offset = values[5:8]
        memory.windows[values[:5]] = OpenWindow(list(values[8:]), logged_at, partition, offset, is_stored=True)


def _add_up(batch: Sequence[Projected], memory: PartitionMemory) -> Grown:
    """Add every signal to its window; gives the windows that grew."""
    windows, grown = memory.windows, Grown()
    for projected in batch:
        report = _report(projected)
        run_id, incarnation, layer_id, step = report.run_id, report.incarnation, report.layer_id, report.step
        start = step - step % WINDOW_STEPS
        for signal in report.signals:
            key = (run_id, incarnation, start, layer_id, signal.seed_id)
            window = windows.get(key)
            if window is None:
                window = windows[key] = _opened(projected)
            grown[key] = window
            _add(window.sums, signal)
        progress = memory.progress[run_id, incarnation]
        if step > progress.last_step:
            progress.last_step = step
    return grown


def _add(sums: list[Any], signal: Signal | HealthSignal) -> None:
    """In the order of FIELDS; written out, since it runs for every signal there is."""
    sums[0] += 1
    if signal.non_finite:
        sums[1] += 1
    sums[2] += signal.health_score
    sums[7] += 1
    if (value := signal.activation_mean) is not None:
        sums[3] += value
        sums[8] += 1
    if (value := signal.activation_std) is not None:
        sums[4] += value
        sums[9] += 1
    if (value := signal.dead_ratio) is not None:
        sums[5] += value
        sums[10] += 1
    if (value := signal.gradient_norm) is not None:
        sums[6] += value
        sums[11] += 1


def _opened(first: Projected) -> OpenWindow:
    """A window that begins with this record."""
    logged_at = datetime.fromtimestamp(first.logged_ms / 1000, UTC)
    sums = [0, 0, *(0.0,) * len(FIELDS), *(0,) * len(FIELDS)]
    return OpenWindow(sums, logged_at, first.position.partition, first.position.offset, is_stored=False)


async def _grow(connection: Any, grown: Grown) -> None:
    if not grown:
        return
    rows = [(*key, window.logged_at, *window.sums) for key, window in grown.items()]
    names: Iterable[str] = chain(
        ("run_ids", "incarnations", "steps", "layer_ids", "seed_ids", "logged_ats", "num_signals", "num_non_finites"),
        (f"sums_{n}" for n in range(len(FIELDS))),
        (f"counts_{n}" for n in range(len(FIELDS))),
    )
    columns = {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    await queries("telemetry").grow_windows(connection, **columns)


def _report(projected: Projected) -> HealthReport | LayerHealthMeasured:
    """Both ways of reading one give the same attributes."""
    report = projected.data
    assert isinstance(report, HealthReport | LayerHealthMeasured)
    return report
