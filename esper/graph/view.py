"""The graph view of a run at a boundary: a pure join of rows.

``assemble`` looks only at rows up to the boundary: lifecycle and epochs by sequence, health
windows by step. So the bytes do not depend on what else was folded meanwhile, in which order
topics arrived, or who asks.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from esper.graph.windows import FIELDS, HealthWindow, last_complete_window
from esper.schemas.enums import LayerKind, SeedStage

VIEW_VERSION = 1

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ViewRows:
    """What the view of one boundary is made of, as it lies in the tables.

    ``lifecycle`` and ``epochs`` may hold rows beyond the boundary; they are left out here.
    """

    boundary: Row
    layers: Sequence[Row]
    edges: Sequence[Row]
    resumed_seeds: Sequence[Row]
    lifecycle: Sequence[Row]
    epochs: Sequence[Row]
    windows: Sequence[Row]
    kernels: Sequence[Row]


@dataclass(frozen=True, slots=True)
class LayerView:
    """A node. ``health`` has the means of the layer's seeds over the newest complete window.

    Each value of ``health`` is the mean of its field (see ``esper.graph.windows.FIELDS``) over
    all signals of the layer in the window, None where there were none; ``non_finite_ratio`` is
    the share of signals with a statistic that was not finite.
    """

    layer_id: str
    kind: LayerKind
    num_features: int
    num_parameters: int
    num_seeds: int
    health: Mapping[str, float | None]
    non_finite_ratio: float | None


@dataclass(frozen=True, slots=True)
class SeedView:
    """A seed as it stood at the boundary; ``health`` as in ``LayerView``, of its own chunk."""

    layer_id: str
    seed_id: int
    stage: SeedStage
    since_step: int
    blueprint_id: str | None
    num_parameters: int
    germinated_at_step: int | None
    health: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class EpochView:
    """The metrics at the end of an epoch."""

    epoch: int
    step: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class KernelView:
    """A kernel of a certified blueprint that could be germinated."""

    blueprint_id: str
    blueprint_version: int
    kernel_sha256: str
    size_bytes: int
    target: LayerKind
    num_features: int
    num_parameters: int


@dataclass(frozen=True)
class GraphView:
    """Everything a decision sees. ``to_bytes`` is its one form, ``digest`` names it."""

    run_id: str
    incarnation: int
    boundary: int
    step: int
    epoch: int
    layers: tuple[LayerView, ...]
    edges: tuple[tuple[str, str], ...]
    seeds: tuple[SeedView, ...]
    epochs: tuple[EpochView, ...]
    kernels: tuple[KernelView, ...]
    view_version: int = field(default=VIEW_VERSION)

    def to_bytes(self) -> bytes:
        """Canonical JSON: keys sorted, no spaces, floats in their shortest exact form."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ``to_bytes``, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def assemble(rows: ViewRows) -> GraphView:
    """Join the rows of one boundary into its view. Row order does not matter."""
    at = rows.boundary
    windows = _windows(rows.windows, at["step"])
    last = at["last_sequences"]
    lifecycle = _up_to(rows.lifecycle, last.get("control.kasmina.lifecycle", -1))
    layers = sorted(rows.layers, key=lambda r: r["ordinal"])
    stages = _stages(rows.resumed_seeds, lifecycle)
    return GraphView(
        run_id=at["run_id"],
        incarnation=at["incarnation"],
        boundary=at["boundary"],
        step=at["step"],
        epoch=at["epoch"],
        layers=tuple(_layer(row, windows) for row in layers),
        edges=tuple(sorted((r["source"], r["target"]) for r in rows.edges)),
        seeds=tuple(_seed(row["layer_id"], n, stages, windows) for row in layers for n in range(row["num_seeds"])),
        epochs=tuple(
            EpochView(r["epoch"], r["step"], dict(sorted(r["metrics"].items())))
            for r in sorted(rows.epochs, key=lambda r: (r["step"], r["epoch"]))
            if r["step"] <= at["step"]
        ),
        kernels=tuple(
            sorted((_kernel(r) for r in rows.kernels), key=lambda k: (k.blueprint_id, k.target, k.num_features))
        ),
    )


def _up_to(rows: Sequence[Row], sequence: int) -> list[Row]:
    return sorted((r for r in rows if r["sequence"] <= sequence), key=lambda r: r["sequence"])


def _windows(rows: Sequence[Row], step: int) -> dict[tuple[str, int], HealthWindow]:
    newest = last_complete_window(step)
    return {
        (r["layer_id"], r["seed_id"]): HealthWindow(
            r["num_signals"], r["num_non_finite"], tuple(r["sums"]), tuple(r["counts"])
        )
        for r in rows
        if r["step"] == newest
    }


def _stages(resumed: Sequence[Row], lifecycle: Sequence[Row]) -> dict[tuple[str, int], dict[str, Any]]:
    stages: dict[tuple[str, int], dict[str, Any]] = {
        (r["layer_id"], r["seed_id"]): {
            "stage": r["stage"],
            "since_step": r["stage_since_step"],
            "blueprint_id": r["blueprint_id"],
            "num_parameters": 0,
            "germinated_at_step": None,
        }
        for r in resumed
    }
    for row in lifecycle:
        key = (row["layer_id"], row["seed_id"])
        germinated = row["to_stage"] == SeedStage.GERMINATED
        before = stages.get(key, {})
        stages[key] = {
            "stage": row["to_stage"],
            "since_step": row["step"],
            "blueprint_id": row["blueprint_id"],
            "num_parameters": row["num_parameters"],
            "germinated_at_step": row["step"] if germinated else before.get("germinated_at_step"),
        }
    return stages


def _layer(row: Row, windows: Mapping[tuple[str, int], HealthWindow]) -> LayerView:
    mine = [w for n in range(row["num_seeds"]) if (w := windows.get((row["layer_id"], n))) is not None]
    whole = HealthWindow()
    for window in mine:  # in seed order: the bits of a sum depend on it
        whole = HealthWindow(
            whole.num_signals + window.num_signals,
            whole.num_non_finite + window.num_non_finite,
            tuple(a + b for a, b in zip(whole.sums, window.sums, strict=True)),
            tuple(a + b for a, b in zip(whole.counts, window.counts, strict=True)),
        )
    return LayerView(
        layer_id=row["layer_id"],
        kind=LayerKind(row["kind"]),
        num_features=row["num_features"],
        num_parameters=row["num_parameters"],
        num_seeds=row["num_seeds"],
        health=whole.means,
        non_finite_ratio=whole.num_non_finite / whole.num_signals if whole.num_signals else None,
    )


def _seed(
    layer_id: str,
    seed_id: int,
    stages: Mapping[tuple[str, int], Mapping[str, Any]],
    windows: Mapping[tuple[str, int], HealthWindow],
) -> SeedView:
    found = stages.get((layer_id, seed_id), {})
    window = windows.get((layer_id, seed_id))
    return SeedView(
        layer_id=layer_id,
        seed_id=seed_id,
        stage=SeedStage(found.get("stage", SeedStage.DORMANT)),
        since_step=found.get("since_step", 0),
        blueprint_id=found.get("blueprint_id"),
        num_parameters=found.get("num_parameters", 0),
        germinated_at_step=found.get("germinated_at_step"),
        health=window.means if window else dict.fromkeys(FIELDS),
    )


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
