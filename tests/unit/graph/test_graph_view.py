"""Graph views: assembly depends on the rows up to the boundary alone, and every version of the bytes stays readable."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data.reference_health_windows import HealthWindow, change_of, total_of
from support.paths import DOCS, TESTS

from esper.errors import ContractError, NewerVersionError
from esper.graph.assembly import assemble
from esper.graph.feature_docs import replace_feature_tables
from esper.graph.features import FEATURES, MAX_EPOCHS, RECENT_STEPS, VIEW_VERSION, Level, value_of
from esper.graph.graph_view import GraphView, digest_of
from esper.graph.health_windows import (
    COLUMNS,
    FIELDS,
    WINDOW_STEPS,
    add_signal,
    last_complete_window,
    new_sums,
)
from esper.graph.view_rows import ViewRows
from esper.schemas.enums import BreakerState, SeedStage
from esper.schemas.operational import HealthSignal

STEP = 3 * WINDOW_STEPS
SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)
PAGE = DOCS / "reference" / "view-features.md"
VERSION_1 = TESTS / "contract" / "views" / "view-v1.json"
TABLES = ("layers", "edges", "lifecycle", "breakers", "rejections", "epochs", "gaps", "windows", "kernels")


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


def rows(scores: list[float], **changed: Any) -> ViewRows:
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


@given(scores=SCORES, order=st.randoms(use_true_random=False))
def test_assemble_ignores_row_order(scores: list[float], order: random.Random) -> None:
    expected = rows(scores)
    shuffled = {}
    for name in TABLES:
        shuffled[name] = list(getattr(expected, name))
        order.shuffle(shuffled[name])
    assert assemble(rows(scores, **shuffled)).to_bytes() == assemble(expected).to_bytes()


@given(scores=SCORES)
def test_assemble_ignores_rows_after_the_boundary(scores: list[float]) -> None:
    before = rows(scores)
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
    assert assemble(rows(scores, **later)).digest == assemble(before).digest


def test_assemble_gives_the_state_at_the_boundary() -> None:
    view = assemble(rows([0.5]))
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
    before = rows([0.5])
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
    first = rows([0.5]).lifecycle[:2]
    moves = [
        *first,
        {**first[0], "layer_id": "a", "step": 15, "sequence": 11},
        {**own, "step": 35, "to_stage": "germinated"},
    ]
    fields = {"incarnation": 2, "from_step": 32, "last_sequences": {"control.kasmina.lifecycle": 1}}
    view = assemble(
        rows(
            [0.5],
            boundary={**rows([0.5]).boundary, **fields},
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
    layers = [{**r, "num_seeds": n} for r, n in zip(rows([1.0]).layers, num_seeds, strict=True)]
    view = assemble(rows([1.0], windows=stored, layers=layers))

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
    epochs = [{**e, "metrics": {"loss": n}} for e, n in zip(rows([1.0]).epochs, (1.7e308, -1.7e308), strict=False)]
    view = assemble(
        rows(
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
    epochs = [{**rows([1.0]).epochs[0], "epoch": n, "step": n} for n in range(MAX_EPOCHS + 9)]
    view = assemble(rows([1.0], epochs=epochs, num_epochs=len(epochs)))
    assert [e.epoch for e in view.epochs] == list(range(9, MAX_EPOCHS + 9))
    assert (view.num_epochs, view.progress) == (MAX_EPOCHS + 9, 1.0)


# -- bytes ----------------------------------------------------------------------------------------


def test_encoding_of_numbers_is_pinned() -> None:
    """The digest of stored views depends on the form of numbers: another JSON library must write the same."""
    numbers = (0.1, -0.0, 1e-7, 1e16, 5e-324, 1.7976931348623157e308, 100.0, 1 / 3)
    epochs = [{**rows([1.0]).epochs[0], "metrics": {f"m{n}": number for n, number in enumerate(numbers)}}]
    written = assemble(rows([1.0], epochs=epochs, num_epochs=2**63 - 1)).to_bytes().decode()
    assert (
        '"metrics":[{"m0":0.1,"m1":-0.0,"m2":1e-7,"m3":1e16,"m4":5e-324,"m5":1.7976931348623157e308,"m6":100.0,'
        '"m7":0.3333333333333333}]'
    ) in written
    assert '"num_epochs":9223372036854775807' in written


def test_assemble_bounds_counts_to_int64() -> None:
    gap = rows([1.0]).gaps[0]
    view = assemble(rows([1.0], gaps=[{**gap, "num_lost": 2**63 - 1}] * 4))
    assert view.num_telemetry_lost == 2**63 - 1
    boundary = {**rows([1.0]).boundary, "hyperparameters": {"epochs": 10**40}}
    assert assemble(rows([1.0], boundary=boundary)).planned_epochs is None
    assert GraphView.from_bytes(view.to_bytes()) == view


@given(scores=SCORES)
def test_view_round_trips_through_bytes(scores: list[float]) -> None:
    view = assemble(rows(scores))
    back = GraphView.from_bytes(view.to_bytes())
    assert back == view
    assert back.to_bytes() == view.to_bytes()
    assert back.digest == digest_of(view.to_bytes())


def test_bytes_hold_exactly_the_declared_features() -> None:
    document = json.loads(assemble(rows([0.5])).to_bytes())
    tables = {
        "layers": Level.LAYER,
        "edges": Level.EDGE,
        "seeds": Level.SEED,
        "epochs": Level.EPOCH,
        "kernels": Level.KERNEL,
    }
    assert document.keys() == {*(f.name for f in FEATURES[Level.RUN]), *tables, "view_version"}
    for table, level in tables.items():
        assert document[table].keys() == {f.name for f in FEATURES[level]}
    for level, features in FEATURES.items():
        assert len({f.name for f in features}) == len(features), level
        assert all(1 <= f.since <= VIEW_VERSION and f.formula and f.source for f in features)


def test_page_has_the_declared_features() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == replace_feature_tables(page), (
        "run: python -m esper.graph.feature_docs docs/reference/view-features.md"
    )


def test_only_nullable_features_are_null() -> None:
    empty = ViewRows(
        boundary=rows([0.5]).boundary, edges=(), lineage=(), resumed_seeds=(), lifecycle=(), breakers=(), rejections=(),
        epochs=rows([0.5]).epochs, num_epochs=0, gaps=(), windows=(), kernels=[kernel_row()], layers=rows([0.5]).layers,
        blueprint_offsets=(9,) * 6,
    )  # fmt: skip
    for view in (assemble(empty), assemble(rows([0.5])), GraphView.from_bytes(VERSION_1.read_bytes())):
        objects = {
            Level.RUN: [view],
            Level.LAYER: view.layers,
            Level.SEED: view.seeds,
            Level.EPOCH: view.epochs,
            Level.KERNEL: view.kernels,
        }
        for level, found in objects.items():
            for feature in FEATURES[level]:
                values = [value_of(item, feature) for item in found]
                assert values, "every level has an object"
                assert feature.is_nullable or None not in values, feature


def test_view_of_version_1_stays_readable() -> None:
    data = VERSION_1.read_bytes()
    assert digest_of(data) == "3ddc01285148780d322761b922d3f45112ad8d2f1714ca3ec264659b5c6d92ad"
    view = GraphView.from_bytes(data)
    assert (view.run_id, view.boundary, view.step, view.num_epochs, view.edges) == ("r", 2, 48, 2, (("a", "b"),))
    assert view.layers[0].health == {**dict.fromkeys(FIELDS), "health_score": 0.375, "gradient_norm": 0.1}
    assert (view.layers[0].non_finite_ratio, view.layers[0].num_signals) == (0.0, None)
    (moved,) = [s for s in view.seeds if s.stage is SeedStage.GERMINATED]
    assert (moved.layer_id, moved.seed_id, moved.since_step, moved.blueprint_id, moved.breaker) == (
        "b",
        1,
        10,
        "x",
        None,
    )
    assert view.epochs[1].metrics == {"val_accuracy": 0.3, "loss": None}
    assert view.kernels[0].num_parameters == 5
    assert (view.blueprint_offsets, view.progress) == ((), None), "values that version 1 lacks are unknown"
    assert GraphView.from_bytes(view.to_bytes()) == view


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[]", b"{}", b'{"view_version":true}', b'{"view_version":1}', b'{"view_version":2,"layers":[]}']
)  # fmt: skip
def test_from_bytes_refuses_other_data(data: bytes) -> None:
    with pytest.raises(ContractError, match="not a graph view"):
        GraphView.from_bytes(data)


def test_from_bytes_refuses_columns_of_unequal_length() -> None:
    document = json.loads(assemble(rows([0.5])).to_bytes())
    document["seeds"]["stage"].pop()
    with pytest.raises(ContractError, match="differ in length"):
        GraphView.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize("word", ["asleep", 7, ["dormant"], {}, None])
def test_from_bytes_refuses_an_unknown_stage(word: Any) -> None:
    document = json.loads(assemble(rows([0.5])).to_bytes())
    document["seeds"]["stage"][1] = word
    with pytest.raises(ContractError, match="not a graph view"):
        GraphView.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(("level", "column"), [("seeds", "layer_id"), ("edges", "source"), ("edges", "target")])
def test_from_bytes_refuses_an_unknown_layer(level: str, column: str) -> None:
    document = json.loads(assemble(rows([0.5])).to_bytes())
    document[level][column][0] = "elsewhere"
    with pytest.raises(ContractError, match="not a graph view: a seed or edge names an unknown layer, 'elsewhere'"):
        GraphView.from_bytes(json.dumps(document).encode())


def test_columnar_sequence_equals_its_tuple() -> None:
    data = assemble(rows([0.5])).to_bytes()
    seeds, expected = GraphView.from_bytes(data).seeds, tuple(GraphView.from_bytes(data).seeds)
    assert [seeds[n] for n in range(-4, 4)] == [*expected, *expected]
    assert seeds[1:3] == expected[1:3]
    assert seeds == expected
    assert seeds != expected[:3]
    with pytest.raises(IndexError):
        seeds[4]


def test_from_bytes_refuses_a_newer_version() -> None:
    document = {**json.loads(VERSION_1.read_bytes()), "view_version": VIEW_VERSION + 1}
    with pytest.raises(NewerVersionError, match="upgrade"):
        GraphView.from_bytes(json.dumps(document).encode())
