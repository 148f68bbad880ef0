"""``assemble(rows)``: the view of one boundary, a pure join of rows.

It looks only at rows up to the boundary, by the order of the log. So the bytes do not depend on
what else was folded meanwhile, in which order topics arrived, or who asks, and when.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import isfinite
from operator import itemgetter
from typing import Any

from esper.graph.features import MAX_EPOCHS, RECENT_STEPS
from esper.graph.rows import Row, ViewRows
from esper.graph.seeds import SeedKey, SeedState, seed_states
from esper.graph.view import NO_HEALTH, EpochView, GraphView, KernelView, LayerView, SeedView
from esper.graph.windows import COLUMNS, WINDOW_STEPS, HealthWindow, last_complete_window
from esper.schemas.base import MAX_INT64
from esper.schemas.enums import BreakerState, LayerKind, SeedStage
from esper.schemas.topics import LIFECYCLE, TELEMETRY

Windows = Mapping[SeedKey, HealthWindow]
_ASLEEP = SeedState()
_KEY = itemgetter("layer_id", "seed_id")
_SUMS = itemgetter(*COLUMNS)


def assemble(rows: ViewRows) -> GraphView:
    """Join the rows of one boundary into its view. Row order does not matter."""
    at, step = rows.boundary, rows.boundary["step"]
    told = at["last_sequences"].get(LIFECYCLE.name, -1)
    newest = last_complete_window(step)
    windows = _windows(rows, newest)
    before = _windows(rows, newest - WINDOW_STEPS)
    layers = sorted(rows.layers, key=lambda r: r["ordinal"])
    line = {r["incarnation"]: r["lifecycle_sequence"] for r in rows.line if r["lifecycle_sequence"] is not None}
    seeds = _Seeds(
        step,
        seed_states(at["incarnation"], at["from_step"], line, rows.lifecycle, rows.resumed_seeds),
        _breakers(rows.breakers, told),
        [r for r in rows.rejections if r["seen_from"] <= told and r["step"] > step - RECENT_STEPS],
    )
    planned = at["hyperparameters"].get("epochs")
    if not isinstance(planned, int) or isinstance(planned, bool) or not 0 < planned <= MAX_INT64:
        planned = None
    return GraphView(
        run_id=at["run_id"],
        incarnation=at["incarnation"],
        boundary=at["boundary"],
        step=step,
        epoch=at["epoch"],
        layers=tuple(_layer(row, windows, before) for row in layers),
        edges=tuple(sorted((r["source"], r["target"]) for r in rows.edges)),
        seeds=tuple(seeds.view(row["layer_id"], n, windows, before) for row in layers for n in range(row["num_seeds"])),
        epochs=_epochs(r for r in rows.epochs if r["log_offset"] < at["log_offset"]),
        kernels=_kernels(rows),
        num_epochs=rows.num_epochs,
        window_step=newest if newest >= 0 else None,
        planned_epochs=planned,
        progress=min(1.0, rows.num_epochs / planned) if planned else None,
        steps_since_start=step - at["from_step"],
        num_telemetry_lost=min(_num_lost(rows, newest), MAX_INT64),
        num_rejections=len(seeds.rejections),
        blueprint_offsets=tuple(rows.blueprint_offsets),
    )


class _Seeds:
    """What is known of seeds at one boundary."""

    def __init__(
        self,
        step: int,
        states: Mapping[SeedKey, SeedState],
        breakers: Mapping[SeedKey, Row],
        rejections: Sequence[Row],
    ) -> None:
        self.rejections = rejections
        self._step, self._states, self._breakers = step, states, breakers
        self._rejected: dict[SeedKey, int] = {}
        for row in rejections:
            key = (row["layer_id"], row["seed_id"])
            self._rejected[key] = self._rejected.get(key, 0) + 1

    def view(self, layer_id: str, seed_id: int, windows: Windows, before: Windows) -> SeedView:
        """One seed; asleep where nothing is known."""
        key = (layer_id, seed_id)
        state, breaker, window = self._states.get(key, _ASLEEP), self._breakers.get(key), windows.get(key)
        health = NO_HEALTH if window is None else window.means
        return SeedView(
            layer_id=layer_id,
            seed_id=seed_id,
            stage=state.stage,
            since_step=state.since_step,
            blueprint_id=state.blueprint_id,
            num_parameters=0 if state.stage is SeedStage.DORMANT else state.num_parameters,
            germinated_at_step=state.germinated_at_step,
            health=health,
            health_change=_change(health, before.get(key)),
            non_finite_ratio=window.non_finite_ratio if window else None,
            num_signals=window.num_signals if window else 0,
            steps_in_stage=self._step - state.since_step,
            num_germinations=state.num_germinations,
            num_given_up=state.num_given_up,
            breaker=BreakerState(breaker["to_state"]) if breaker else BreakerState.CLOSED,
            num_failures=breaker["num_failures"] if breaker else 0,
            num_rejections=self._rejected.get(key, 0),
        )


def _windows(rows: ViewRows, step: int) -> Windows:
    """The windows that begin at ``step``. Late records are added after those in order, as they came."""
    told = rows.boundary["last_sequences"].get(TELEMETRY.name, -1)
    counted: list[Row] = []
    late: list[Row] = []
    for r in rows.windows:
        if r["step"] == step:
            (late if r["late_from"] else counted).append(r)
    late.sort(key=lambda r: (r["late_from"], r["log_offset"], r["place"]))
    found: dict[SeedKey, HealthWindow] = {}
    for r in chain(counted, (r for r in late if r["late_from"] <= told)):
        key, window = _KEY(r), HealthWindow(_SUMS(r))
        found[key] = found[key] + window if key in found else window
    return found


def _layer(row: Row, windows: Windows, before: Windows) -> LayerView:
    whole = _of_layer(row, windows)
    health = whole.means
    return LayerView(
        layer_id=row["layer_id"],
        kind=LayerKind(row["kind"]),
        num_features=row["num_features"],
        num_parameters=row["num_parameters"],
        num_seeds=row["num_seeds"],
        health=health,
        non_finite_ratio=whole.non_finite_ratio,
        health_change=_change(health, _of_layer(row, before)),
        num_signals=whole.num_signals,
    )


def _of_layer(row: Row, windows: Windows) -> HealthWindow:
    total = HealthWindow()
    for n in range(row["num_seeds"]):  # in seed order: the bits of a sum depend on it
        window = windows.get((row["layer_id"], n))
        if window is not None:
            total += window
    return total


def _change(health: Mapping[str, float | None], before: HealthWindow | None) -> Mapping[str, float | None]:
    if before is None or not before.num_signals:
        return NO_HEALTH
    means = before.means
    return {name: _difference(now, means[name]) for name, now in health.items()}


def _difference(now: float | None, before: float | None) -> float | None:
    """Null where either is, and where it is beyond float64: JSON has no infinity."""
    if now is None or before is None:
        return None
    difference = now - before
    return difference if isfinite(difference) else None


def _num_lost(rows: ViewRows, newest: int) -> int:
    gaps = (r for r in rows.gaps if r["log_offset"] < rows.boundary["log_offset"])
    first, end = newest - WINDOW_STEPS, newest + WINDOW_STEPS
    return sum(r["num_lost"] for r in gaps if r["to_step"] >= first and r["from_step"] < end)


def _breakers(changes: Sequence[Row], told: int) -> Mapping[SeedKey, Row]:
    """The last change of each seed's breaker."""
    counted = sorted((r for r in changes if r["seen_from"] <= told), key=lambda r: r["sequence"])
    return {(r["layer_id"], r["seed_id"]): r for r in counted}


def _epochs(rows: Iterable[Row]) -> tuple[EpochView, ...]:
    found: list[EpochView] = []
    before: Mapping[str, Any] = {}
    for r in sorted(rows, key=lambda r: (r["step"], r["epoch"], r["incarnation"], r["sequence"]))[-MAX_EPOCHS:]:
        metrics = dict(sorted(r["metrics"].items()))
        gains = {name: _difference(value, before.get(name)) for name, value in metrics.items()}
        found.append(EpochView(r["epoch"], r["step"], metrics, gains))
        before = metrics
    return tuple(found)


def _kernels(rows: ViewRows) -> tuple[KernelView, ...]:
    """Of each blueprint, target and width the newest kernel: a decision names the blueprint alone."""
    newest: dict[tuple[str, str, int], Row] = {}
    for r in sorted(rows.kernels, key=lambda r: (r["blueprint_version"], r["log_offset"])):
        if r["log_offset"] < rows.blueprint_offsets[r["log_partition"]]:
            newest[r["blueprint_id"], r["target"], r["num_features"]] = r
    return tuple(_kernel(row) for _key, row in sorted(newest.items()))


def _kernel(row: Row) -> KernelView:
    return KernelView(
        blueprint_id=row["blueprint_id"],
        blueprint_version=row["blueprint_version"],
        kernel_sha256=row["kernel_sha256"],
        size_bytes=row["size_bytes"],
        target=LayerKind(row["target"]),
        num_features=row["num_features"],
        num_parameters=row["num_parameters"],
    )
