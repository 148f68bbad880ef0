"""telemetry.seed.health -> health_windows: tumbling windows of WINDOW_STEPS steps.

Sums are added up one record at a time in the order of the log, starting from the stored row:
so their bits do not depend on how the log was cut into batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from esper.graph.windows import WINDOW_STEPS, HealthWindow, WindowKey
from esper.schemas import events
from esper.schemas.operational import HealthSignal
from esper.streams.projected import Projected
from esper.streams.queries import queries

_COLUMNS = ("run_id", "incarnation", "layer_id", "seed_id", "step")


async def project(connection: Any, batch: Sequence[Projected]) -> None:
    """Fold the signals of one partition, in their order."""
    signals = list(_keyed_signals(batch))
    windows = await _load(connection, {key for key, _signal in signals})
    for key, signal in signals:
        windows[key] = windows.get(key, HealthWindow()).add(signal)
    await queries("telemetry").write_window(
        connection,
        [{**dict(zip(_COLUMNS, key, strict=True)), **window.columns} for key, window in windows.items()],
    )


def _keyed_signals(batch: Sequence[Projected]) -> Iterator[tuple[WindowKey, HealthSignal]]:
    for projected in batch:
        event = projected.message.data
        assert isinstance(event, events.LayerHealthMeasured)
        start = event.step - event.step % WINDOW_STEPS
        for signal in event.signals:
            yield (event.run_id, event.incarnation, event.layer_id, signal.seed_id, start), signal


async def _load(connection: Any, keys: set[WindowKey]) -> dict[WindowKey, HealthWindow]:
    run_ids, incarnations, layer_ids, seed_ids, steps = (list(c) for c in zip(*sorted(keys), strict=True))
    rows = queries("telemetry").windows_of(
        connection,
        run_ids=run_ids,
        incarnations=incarnations,
        layer_ids=layer_ids,
        seed_ids=seed_ids,
        steps=steps,
    )
    return {
        tuple(row[c] for c in _COLUMNS): HealthWindow(
            row["num_signals"], row["num_non_finite"], tuple(row["sums"]), tuple(row["counts"])
        )
        async for row in rows
    }
