"""A view depends on the rows up to its boundary, and on nothing else."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from esper.graph.view import ViewRows, assemble
from esper.graph.windows import WINDOW_STEPS, HealthWindow, last_complete_window
from esper.schemas.enums import SeedStage
from esper.schemas.operational import HealthSignal

STEP = 3 * WINDOW_STEPS
SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


def rows(scores: list[float], **changed: Any) -> ViewRows:
    window = HealthWindow()
    for score in scores:
        window = window.add(HealthSignal(layer_id="a", seed_id=0, chunk_id=0, epoch=0, health_score=score))
    start = last_complete_window(STEP)
    moves = [("dormant", "germinated"), ("germinated", "training"), ("training", "grafting")]
    fields: dict[str, Any] = {
        "boundary": {
            "run_id": "r", "incarnation": 1, "boundary": 2, "step": STEP, "epoch": 1,
            "last_sequences": {"control.kasmina.lifecycle": 11},
        },
        "layers": [
            {"layer_id": n, "ordinal": k, "kind": "linear", "num_features": 4, "num_parameters": 20, "num_seeds": 2}
            for k, n in enumerate("ab")
        ],
        "edges": [{"source": "a", "target": "b"}],
        "resumed_seeds": [],
        "lifecycle": [
            {"sequence": 10 + n, "step": 10 * n, "layer_id": "b", "seed_id": 1, "to_stage": to, "blueprint_id": "x", "num_parameters": 5}
            for n, (_from, to) in enumerate(moves)
        ],
        "epochs": [{"epoch": n, "step": 20 * (n + 1), "metrics": {"val_accuracy": 0.1 * n}} for n in range(4)],
        "windows": [{"layer_id": "a", "seed_id": 0, "step": start, **window.columns}],
        "kernels": [],
    }  # fmt: skip
    return ViewRows(**{**fields, **changed})


@given(scores=SCORES, order=st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(scores: list[float], order: random.Random) -> None:
    whole = rows(scores)
    shuffled = {}
    for name in ("layers", "edges", "lifecycle", "epochs", "windows"):
        shuffled[name] = list(getattr(whole, name))
        order.shuffle(shuffled[name])
    assert assemble(rows(scores, **shuffled)).to_bytes() == assemble(whole).to_bytes()


@given(scores=SCORES)
def test_what_comes_after_the_boundary_does_not_show(scores: list[float]) -> None:
    before = rows(scores)
    later = {
        "lifecycle": [
            *before.lifecycle,
            {**before.lifecycle[-1], "sequence": 50, "step": STEP + 4, "to_stage": "stabilizing"},
        ],
        "epochs": [*before.epochs, {"epoch": 9, "step": STEP + 1, "metrics": {"val_accuracy": 0.9}}],
        "windows": [*before.windows, {**before.windows[0], "step": STEP}],
    }
    assert assemble(rows(scores, **later)).digest == assemble(before).digest


def test_a_view_shows_seeds_as_they_stood_at_the_boundary() -> None:
    seen = assemble(rows([0.5]))
    stages = {(s.layer_id, s.seed_id): s.stage for s in seen.seeds}
    assert stages["b", 1] is SeedStage.TRAINING, "grafting came later than the boundary"
    assert stages["a", 0] is SeedStage.DORMANT
    assert [e.epoch for e in seen.epochs] == [0, 1]
    assert seen.layers[0].health["health_score"] == 0.5
    assert seen.layers[1].health["health_score"] is None


def test_a_resumed_run_starts_from_what_its_checkpoint_held() -> None:
    held = [{"layer_id": "a", "seed_id": 1, "stage": "fossilized", "stage_since_step": 7, "blueprint_id": "x"}]
    seen = assemble(rows([0.5], resumed_seeds=held))
    assert {s.stage for s in seen.seeds if (s.layer_id, s.seed_id) == ("a", 1)} == {SeedStage.FOSSILIZED}


@given(scores=SCORES, cut=st.integers(0, 30))
def test_a_window_folded_in_two_batches_has_the_bits_of_one(scores: list[float], cut: int) -> None:
    def fold(window: HealthWindow, part: list[float]) -> HealthWindow:
        for score in part:
            window = window.add(HealthSignal(layer_id="a", seed_id=0, chunk_id=0, epoch=0, health_score=score))
        return window

    first = fold(HealthWindow(), scores[:cut])
    stored = HealthWindow(first.num_signals, first.num_non_finite, tuple(first.sums), tuple(first.counts))
    assert fold(stored, scores[cut:]) == fold(HealthWindow(), scores)


def test_windows_are_complete_only_with_their_last_step() -> None:
    assert last_complete_window(WINDOW_STEPS - 2) < 0
    assert last_complete_window(WINDOW_STEPS - 1) == 0
    assert last_complete_window(2 * WINDOW_STEPS - 2) == 0
