"""Assembly: a view depends on the rows up to its boundary alone, and its sums are exact to the bit."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data.reference_health_windows import HealthWindow, change_of, total_of
from support.events.view_row_examples import STEP, add_signals, kernel_row, signal, view_rows, window_of, window_row

from esper.graph.assembly import assemble
from esper.graph.graph_view import GraphView
from esper.graph.health_windows import WINDOW_STEPS, last_complete_window
from esper.graph.view_features import MAX_EPOCHS, RECENT_STEPS
from esper.schemas.enums import BreakerState, SeedStage
from esper.schemas.operational import HealthSignal

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)
TABLES = ("layers", "edges", "lifecycle", "breakers", "rejections", "epochs", "gaps", "windows", "kernels")


@given(scores=SCORES, order=st.randoms(use_true_random=False))
def test_assemble_ignores_row_order(scores: list[float], order: random.Random) -> None:
    expected = view_rows(scores)
    shuffled = {}
    for name in TABLES:
        shuffled[name] = list(getattr(expected, name))
        order.shuffle(shuffled[name])
    assert assemble(view_rows(scores, **shuffled)).to_bytes() == assemble(expected).to_bytes()


@given(scores=SCORES)
def test_assemble_ignores_rows_after_the_boundary(scores: list[float]) -> None:
    before = view_rows(scores)
    late = {"late_from": 31, "log_offset": 9, "place": 0}
    later = {
        "lifecycle": [
            *before.lifecycle,
            {**before.lifecycle[-1], "sequence": 50, "seen_from": 50, "step": STEP + 4, "to_stage": "stabilizing"},
            {**before.lifecycle[-1], "sequence": 10, "seen_from": 51, "to_stage": "dormant"},
            {**before.lifecycle[-1], "incarnation": 2, "sequence": 0, "seen_from": 0},
        ],
        "epochs": [*before.epochs, {**before.epochs[0], "epoch": 9, "log_offset": 51}],
        "windows": [
            *before.windows,
            {**before.windows[0], "step": STEP},
            {**before.windows[0], **late},
        ],
        "breakers": [*before.breakers, {**before.breakers[0], "seen_from": 12}],
        "rejections": [*before.rejections, {**before.rejections[0], "step": STEP - RECENT_STEPS}],
        "kernels": [*before.kernels, kernel_row(blueprint_id="y", log_partition=3, log_offset=0)],
    }
    assert assemble(view_rows(scores, **later)).digest == assemble(before).digest


def test_assemble_gives_the_state_at_the_boundary() -> None:
    view = assemble(view_rows([0.5]))
    stages = {(s.layer_id, s.seed_id): s for s in view.seeds}
    moved = stages["b", 1]
    assert moved.stage is SeedStage.TRAINING, "grafting came later than the boundary"
    assert (moved.since_step, moved.steps_in_stage, moved.germinated_at_step) == (10, STEP - 10, 0)
    assert (moved.num_germinations, moved.num_given_up) == (1, 0)
    assert (moved.breaker, moved.num_failures) == (BreakerState.HALF_OPEN, 9)
    assert (moved.num_rejections, view.num_rejections) == (2, 2)
    assert stages["a", 0].stage is SeedStage.DORMANT
    assert [e.epoch for e in view.epochs] == [0, 1]
    assert [e.gains for e in view.epochs] == [{"val_accuracy": None}, {"val_accuracy": 0.25}]
    assert view.layers[0].health["health_score"] == 0.5
    assert view.layers[0].health_change["health_score"] == -0.25
    assert view.layers[1].health["health_score"] is None
    assert (view.progress, view.planned_epochs, view.num_telemetry_lost) == (0.5, 4, 7)
    assert [k.blueprint_version for k in view.kernels] == [2], "the newest projected kernel of a blueprint"


def test_assemble_adds_late_signals_before_the_boundary() -> None:
    late = window_row(window_of([1.0]), last_complete_window(STEP), late_from=30, log_offset=9)
    before = view_rows([0.5])
    view = assemble(replace(before, windows=[late, *before.windows]))
    assert (view.seeds[0].num_signals, view.seeds[0].health["health_score"]) == (2, 0.75)


def test_assemble_starts_a_resumed_run_from_its_checkpoint() -> None:
    saved = [{"layer_id": "b", "seed_id": 1, "stage": "grafting", "stage_since_step": 30, "blueprint_id": "x"}]
    own = {
        "incarnation": 2,
        "sequence": 1,
        "seen_from": 1,
        "layer_id": "a",
        "seed_id": 0,
        "blueprint_id": "x",
        "num_parameters": 5,
    }
    first = view_rows([0.5]).lifecycle[:2]
    moves = [
        *first,
        {**first[0], "layer_id": "a", "step": 15, "sequence": 11},
        {**own, "step": 35, "to_stage": "germinated"},
    ]
    fields = {"incarnation": 2, "from_step": 32, "last_sequences": {"control.kasmina.lifecycle": 1}}
    view = assemble(
        view_rows(
            [0.5],
            boundary={**view_rows([0.5]).boundary, **fields},
            lineage=[{"incarnation": 2, "lifecycle_sequence": 1}, {"incarnation": 1, "lifecycle_sequence": 11}],
            resumed_seeds=saved,
            lifecycle=moves,
        )
    )
    seeds = {(s.layer_id, s.seed_id): s for s in view.seeds}
    kept, again, gone = seeds["b", 1], seeds["a", 0], seeds["a", 1]
    assert (kept.stage, kept.since_step, kept.blueprint_id) == (SeedStage.GRAFTING, 30, "x")
    assert (kept.germinated_at_step, kept.num_parameters) == (0, 5), "the history comes from older incarnations"
    assert (again.stage, again.num_germinations, again.germinated_at_step) == (SeedStage.GERMINATED, 1, 35)
    assert (gone.stage, gone.since_step, gone.num_germinations, gone.num_parameters) == (SeedStage.DORMANT, 32, 1, 0)
    assert view.steps_since_start == STEP - 32


@given(scores=SCORES, cut=st.integers(0, 30))
def test_window_sums_do_not_depend_on_batches(scores: list[float], cut: int) -> None:
    """Adding signals in two batches gives the same bits as in one."""
    first = window_of(scores[:cut])
    assert add_signals([signal(health_score=score) for score in scores[cut:]], first) == window_of(scores)


NUMBERS = st.none() | st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False)
SIGNALS = st.lists(st.builds(signal, health_score=st.floats(0, 1), activation_mean=NUMBERS), max_size=4)


@given(
    reports=st.lists(st.tuples(SIGNALS, st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 2)), max_size=14),
    num_seeds=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_health_arrays_equal_the_sequential_reference(
    reports: list[tuple[list[HealthSignal], str, int, int]], num_seeds: tuple[int, int]
) -> None:
    """The arrays give the same bits as adding windows one by one."""
    newest, windows = last_complete_window(STEP), [(add_signals(signals), *key) for signals, *key in reports]
    stored = [window_row(w, newest - back * WINDOW_STEPS, layer_id=a, seed_id=n) for w, a, n, back in windows]
    layers = [{**r, "num_seeds": n} for r, n in zip(view_rows([1.0]).layers, num_seeds, strict=True)]
    view = assemble(view_rows([1.0], windows=stored, layers=layers))

    def of_seed(layer_id: str, seed_id: int, back: int) -> HealthWindow:
        return total_of(w for w, *key in windows if key == [layer_id, seed_id, back])

    for seed in view.seeds:
        now, before = (of_seed(seed.layer_id, seed.seed_id, back) for back in (0, 1))
        assert (seed.health, seed.health_change) == (now.means, change_of(now, before))
        assert (seed.num_signals, seed.non_finite_ratio) == (now.num_signals, now.non_finite_ratio)
    for layer in view.layers:
        now, before = (total_of(of_seed(layer.layer_id, n, b) for n in range(layer.num_seeds)) for b in (0, 1))
        assert (layer.health, layer.health_change) == (now.means, change_of(now, before))
        assert (layer.num_signals, layer.non_finite_ratio) == (now.num_signals, now.non_finite_ratio)


def test_last_complete_window_needs_its_last_step() -> None:
    assert last_complete_window(WINDOW_STEPS - 2) < 0
    assert last_complete_window(WINDOW_STEPS - 1) == 0
    assert last_complete_window(2 * WINDOW_STEPS - 2) == 0


@pytest.mark.parametrize("numbers", [(1.7e308, 1.7e308), (1.7e308, 1.7e308, -1.7e308, -1.7e308), (-1.7e308, -1.7e308)])
def test_assemble_gives_null_beyond_float64(numbers: tuple[float, ...]) -> None:
    window = add_signals([signal(health_score=0.5, activation_mean=number) for number in numbers])
    start = last_complete_window(STEP)
    epochs = [{**e, "metrics": {"loss": n}} for e, n in zip(view_rows([1.0]).epochs, (1.7e308, -1.7e308), strict=False)]
    view = assemble(
        view_rows(
            [1.0],
            windows=[window_row(window, start), window_row(window_of([0.5]), start - WINDOW_STEPS)],
            epochs=epochs,
        )
    )
    assert view.seeds[0].health["activation_mean"] is None
    assert view.seeds[0].health["health_score"] == 0.5
    assert view.epochs[1].gains == {"loss": None}
    assert GraphView.from_bytes(view.to_bytes()) == view


def test_assemble_keeps_the_newest_epochs_and_counts_all() -> None:
    epochs = [{**view_rows([1.0]).epochs[0], "epoch": n, "step": n} for n in range(MAX_EPOCHS + 9)]
    view = assemble(view_rows([1.0], epochs=epochs, num_epochs=len(epochs)))
    assert [e.epoch for e in view.epochs] == list(range(9, MAX_EPOCHS + 9))
    assert (view.num_epochs, view.progress) == (MAX_EPOCHS + 9, 1.0)


def test_assemble_bounds_counts_to_int64() -> None:
    gap = view_rows([1.0]).gaps[0]
    view = assemble(view_rows([1.0], gaps=[{**gap, "num_lost": 2**63 - 1}] * 4))
    assert view.num_telemetry_lost == 2**63 - 1
    boundary = {**view_rows([1.0]).boundary, "hyperparameters": {"epochs": 10**40}}
    assert assemble(view_rows([1.0], boundary=boundary)).planned_epochs is None
    assert GraphView.from_bytes(view.to_bytes()) == view
