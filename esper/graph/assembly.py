"""``assemble(rows)``: the view of one boundary, a pure join of rows.

Invariant: it uses only rows up to the boundary, by their position in the log. So the bytes of a view do not depend on
rows that were projected later, on the order in which topics arrived, or on the process and the time of the call.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from esper.graph.columnar_sequence import ColumnarSequence
from esper.graph.graph_view import EpochView, GraphView, KernelView, LayerView, SeedView
from esper.graph.health_arrays import Floats, Health, layer_sums, seed_sums
from esper.graph.health_windows import WINDOW_STEPS, last_complete_window
from esper.graph.seed_states import SeedKey, SeedState, seed_states
from esper.graph.view_bytes import Columns
from esper.graph.view_features import MAX_EPOCHS, RECENT_STEPS, Level
from esper.graph.view_rows import Row, ViewRows
from esper.schemas.base import MAX_INT64
from esper.schemas.enums import BreakerState, LayerKind, SeedStage
from esper.schemas.topics import LIFECYCLE, TELEMETRY

_DORMANT = SeedState()


def assemble(rows: ViewRows) -> GraphView:
    """Join the rows of one boundary into its view. Row order does not matter."""
    at, step = rows.boundary, rows.boundary["step"]
    last_sequence = at["last_sequences"].get(LIFECYCLE.name, -1)
    newest = last_complete_window(step)
    layers = sorted(rows.layers, key=lambda r: r["ordinal"])
    seeds = [(r["layer_id"], n) for r in layers for n in range(r["num_seeds"])]
    seed_rows = {key: n for n, key in enumerate(seeds)}
    now, before = (seed_sums(_windows(rows, first), seed_rows) for first in (newest, newest - WINDOW_STEPS))
    ends = {r["incarnation"]: r["lifecycle_sequence"] for r in rows.lineage if r["lifecycle_sequence"] is not None}
    states = seed_states(at["incarnation"], at["from_step"], ends, rows.lifecycle, rows.resumed_seeds)
    rejections = [r for r in rows.rejections if r["seen_from"] <= last_sequence and r["step"] > step - RECENT_STEPS]
    planned = at["hyperparameters"].get("epochs")
    if not isinstance(planned, int) or isinstance(planned, bool) or not 0 < planned <= MAX_INT64:
        planned = None
    return GraphView(
        run_id=at["run_id"],
        incarnation=at["incarnation"],
        boundary=at["boundary"],
        step=step,
        epoch=at["epoch"],
        layers=ColumnarSequence(LayerView, Level.LAYER, _layer_columns(layers, now, before)),
        edges=tuple(sorted((r["source"], r["target"]) for r in rows.edges)),
        seeds=ColumnarSequence(
            SeedView,
            Level.SEED,
            {
                **_seed_columns(step, seeds, states, _breakers(rows.breakers, last_sequence), rejections),
                **Health.of(now).columns(Health.of(before)),
            },
        ),
        epochs=_epochs(r for r in rows.epochs if r["log_offset"] < at["log_offset"]),
        kernels=_kernels(rows),
        num_epochs=rows.num_epochs,
        window_step=newest if newest >= 0 else None,
        planned_epochs=planned,
        progress=min(1.0, rows.num_epochs / planned) if planned else None,
        steps_since_start=step - at["from_step"],
        num_telemetry_lost=min(_num_lost(rows, newest), MAX_INT64),
        num_rejections=len(rejections),
        blueprint_offsets=tuple(rows.blueprint_offsets),
    )


def _layer_columns(layers: Sequence[Row], now: Floats, before: Floats) -> Columns:
    own = ("layer_id", "kind", "num_features", "num_parameters", "num_seeds")
    columns: Columns = {name: [r[name] for r in layers] for name in own}
    of_layers = [Health.of(layer_sums(sums, columns["num_seeds"])) for sums in (now, before)]
    return {**columns, **of_layers[0].columns(of_layers[1])}


def _seed_columns(
    step: int,
    seeds: Sequence[SeedKey],
    states: Mapping[SeedKey, SeedState],
    breakers: Mapping[SeedKey, Row],
    rejections: Sequence[Row],
) -> Columns:
    """The columns of seeds, except their health. A seed without a state is dormant."""
    found = [states.get(key, _DORMANT) for key in seeds]
    changes = [breakers.get(key) for key in seeds]
    rejected = Counter((r["layer_id"], r["seed_id"]) for r in rejections)
    return {
        "layer_id": [layer_id for layer_id, _n in seeds],
        "seed_id": [n for _layer_id, n in seeds],
        "stage": [s.stage for s in found],
        "since_step": [s.since_step for s in found],
        "blueprint_id": [s.blueprint_id for s in found],
        "num_parameters": [0 if s.stage is SeedStage.DORMANT else s.num_parameters for s in found],
        "germinated_at_step": [s.germinated_at_step for s in found],
        "steps_in_stage": [step - s.since_step for s in found],
        "num_germinations": [s.num_germinations for s in found],
        "num_given_up": [s.num_given_up for s in found],
        "breaker": [c["to_state"] if c else BreakerState.CLOSED for c in changes],
        "num_failures": [c["num_failures"] if c else 0 for c in changes],
        "num_rejections": [rejected[key] for key in seeds],
    }


def _windows(rows: ViewRows, step: int) -> list[Row]:
    """The windows that begin at ``step``; those of late records follow, in the order in which they were projected."""
    last_sequence = rows.boundary["last_sequences"].get(TELEMETRY.name, -1)
    found = [r for r in rows.windows if r["step"] == step]
    late = [r for r in found if r["late_from"] and r["late_from"] <= last_sequence]
    late.sort(key=lambda r: (r["late_from"], r["log_offset"], r["place"]))
    return [r for r in found if not r["late_from"]] + late


def _difference(now: float | None, before: float | None) -> float | None:
    """``now - before``; None where either is None, or where the difference is beyond float64: JSON has no infinity."""
    if now is None or before is None:
        return None
    difference = now - before
    return difference if isfinite(difference) else None


def _num_lost(rows: ViewRows, newest: int) -> int:
    gaps = (r for r in rows.gaps if r["log_offset"] < rows.boundary["log_offset"])
    first, end = newest - WINDOW_STEPS, newest + WINDOW_STEPS
    return sum(r["num_lost"] for r in gaps if r["to_step"] >= first and r["from_step"] < end)


def _breakers(changes: Sequence[Row], last_sequence: int) -> Mapping[SeedKey, Row]:
    """The last change of each seed's breaker up to ``last_sequence``."""
    counted = sorted((r for r in changes if r["seen_from"] <= last_sequence), key=lambda r: r["sequence"])
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
    """The newest kernel of each blueprint, target and width, since a decision names only the blueprint."""
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
