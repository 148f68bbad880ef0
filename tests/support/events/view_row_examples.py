"""The rows of one boundary's view, two layers with two seeds each, as the projections store them."""

from typing import Any

from support.data.reference_health_windows import HealthWindow

from esper.graph.health_windows import COLUMNS, WINDOW_STEPS, add_signal, last_complete_window, new_sums
from esper.graph.view_rows import ViewRows
from esper.schemas.operational import HealthSignal

STEP = 3 * WINDOW_STEPS
"""The step of the boundary."""


def window_row(window: HealthWindow, step: int, **changed: Any) -> dict[str, Any]:
    """The stored row of a window."""
    key = {"layer_id": "a", "seed_id": 0, "late_from": 0, "log_offset": 0, "place": 0}
    return {**key, "step": step, **dict(zip(COLUMNS, window.sums, strict=True)), **changed}


def kernel_row(**changed: Any) -> dict[str, Any]:
    kernel = {
        "blueprint_id": "x", "blueprint_version": 1, "kernel_sha256": "ab" * 32, "size_bytes": 9, "target": "linear",
        "num_features": 4, "num_parameters": 8, "log_partition": 2, "log_offset": 5,
    }  # fmt: skip
    return {**kernel, **changed}


def add_signals(signals: list[HealthSignal], before: HealthWindow | None = None) -> HealthWindow:
    """The window of ``before`` after adding the signals."""
    sums = list(before.sums) if before else new_sums()
    for signal in signals:
        add_signal(sums, signal)
    return HealthWindow(tuple(sums))


def signal(**statistics: float | None) -> HealthSignal:
    return HealthSignal.model_validate({"layer_id": "a", "seed_id": 0, "chunk_id": 0, "epoch": 0, **statistics})


def window_of(scores: list[float]) -> HealthWindow:
    return add_signals([signal(health_score=score) for score in scores])


def view_rows(scores: list[float], **changed: Any) -> ViewRows:
    start = last_complete_window(STEP)
    seed_key = {"layer_id": "b", "seed_id": 1}
    fields: dict[str, Any] = {
        "boundary": {
            "run_id": "r", "incarnation": 1, "boundary": 2, "step": STEP, "epoch": 1, "log_offset": 50,
            "last_sequences": {"control.kasmina.lifecycle": 11, "telemetry.seed.health": 30},
            "hyperparameters": {"epochs": 4}, "from_step": 0,
        },
        "layers": [
            {"layer_id": n, "ordinal": k, "kind": "linear", "num_features": 4, "num_parameters": 20, "num_seeds": 2}
            for k, n in enumerate("ab")
        ],
        "edges": [{"source": "a", "target": "b"}],
        "lineage": [{"incarnation": 1, "lifecycle_sequence": 11}],
        "resumed_seeds": [],
        "lifecycle": [
            {"incarnation": 1, "sequence": 10 + n, "seen_from": 10 + n, "step": 10 * n, **seed_key, "to_stage": to, "blueprint_id": "x", "num_parameters": 5}
            for n, to in enumerate(("germinated", "training", "grafting"))
        ],
        "breakers": [
            {"sequence": n, "seen_from": n, **seed_key, "to_state": to, "num_failures": n}
            for n, to in ((3, "open"), (9, "half_open"), (12, "closed"))
        ],
        "rejections": [{"seen_from": n, "step": STEP - 1, **seed_key} for n in (4, 5, 40)],
        "epochs": [
            {"epoch": n, "step": 20 * (n + 1), "metrics": {"val_accuracy": 0.25 * n}, "incarnation": 1, "sequence": n, "log_offset": 40 + 8 * n}
            for n in range(4)
        ],
        "num_epochs": 2,
        "gaps": [
            {"from_step": a, "to_step": b, "num_lost": 7, "log_offset": offset}
            for a, b, offset in ((0, STEP - 1, 30), (0, 2, 31), (STEP - 2, STEP, 60))
        ],
        "windows": [window_row(window_of(scores), start), window_row(window_of([0.5, 1.0]), start - WINDOW_STEPS)],
        "kernels": [kernel_row(), kernel_row(blueprint_version=2, log_offset=7), kernel_row(blueprint_version=3, log_offset=8)],
        "blueprint_offsets": (0, 0, 8, 0, 0, 0),
    }  # fmt: skip
    return ViewRows(**{**fields, **changed})
