"""A view depends on the rows up to its boundary, and on nothing else; its bytes are read for ever."""

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


def window_row(window: HealthWindow, step: int, **place: Any) -> dict[str, Any]:
    """A window as it is stored."""
    key = {"layer_id": "a", "seed_id": 0, "late_from": 0, "log_offset": 0, "place": 0}
    return {**key, "step": step, **dict(zip(COLUMNS, window.sums, strict=True)), **place}


def kernel_row(**changed: Any) -> dict[str, Any]:
    kernel = {
        "blueprint_id": "x", "blueprint_version": 1, "kernel_sha256": "ab" * 32, "size_bytes": 9, "target": "linear",
        "num_features": 4, "num_parameters": 8, "log_partition": 2, "log_offset": 5,
    }  # fmt: skip
    return {**kernel, **changed}


def added(signals: list[HealthSignal], before: HealthWindow | None = None) -> HealthWindow:
    """Signals added up, after what was stored."""
    sums = list(before.sums) if before else new_sums()
    for signal in signals:
        add_signal(sums, signal)
    return HealthWindow(tuple(sums))


def signal(**statistics: float | None) -> HealthSignal:
    return HealthSignal.model_validate({"layer_id": "a", "seed_id": 0, "chunk_id": 0, "epoch": 0, **statistics})


def folded(scores: list[float]) -> HealthWindow:
    return added([signal(health_score=score) for score in scores])


def rows(scores: list[float], **changed: Any) -> ViewRows:
    start = last_complete_window(STEP)
    place = {"layer_id": "b", "seed_id": 1}
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
        "line": [{"incarnation": 1, "lifecycle_sequence": 11}],
        "resumed_seeds": [],
        "lifecycle": [
            {"incarnation": 1, "sequence": 10 + n, "seen_from": 10 + n, "step": 10 * n, **place, "to_stage": to, "blueprint_id": "x", "num_parameters": 5}
            for n, to in enumerate(("germinated", "training", "grafting"))
        ],
        "breakers": [
            {"sequence": n, "seen_from": n, **place, "to_state": to, "num_failures": n}
            for n, to in ((3, "open"), (9, "half_open"), (12, "closed"))
        ],
        "rejections": [{"seen_from": n, "step": STEP - 1, **place} for n in (4, 5, 40)],
        "epochs": [
            {"epoch": n, "step": 20 * (n + 1), "metrics": {"val_accuracy": 0.25 * n}, "incarnation": 1, "sequence": n, "log_offset": 40 + 8 * n}
            for n in range(4)
        ],
        "num_epochs": 2,
        "gaps": [
            {"from_step": a, "to_step": b, "num_lost": 7, "log_offset": offset}
            for a, b, offset in ((0, STEP - 1, 30), (0, 2, 31), (STEP - 2, STEP, 60))
        ],
        "windows": [window_row(folded(scores), start), window_row(folded([0.5, 1.0]), start - WINDOW_STEPS)],
        "kernels": [kernel_row(), kernel_row(blueprint_version=2, log_offset=7), kernel_row(blueprint_version=3, log_offset=8)],
        "blueprint_offsets": (0, 0, 8, 0, 0, 0),
    }  # fmt: skip
    return ViewRows(**{**fields, **changed})


@given(scores=SCORES, order=st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(scores: list[float], order: random.Random) -> None:
    whole = rows(scores)
    shuffled = {}
    for name in TABLES:
        shuffled[name] = list(getattr(whole, name))
        order.shuffle(shuffled[name])
    assert assemble(rows(scores, **shuffled)).to_bytes() == assemble(whole).to_bytes()


@given(scores=SCORES)
def test_what_comes_after_the_boundary_does_not_show(scores: list[float]) -> None:
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


def test_a_view_shows_seeds_as_they_stood_at_the_boundary() -> None:
    seen = assemble(rows([0.5]))
    stages = {(s.layer_id, s.seed_id): s for s in seen.seeds}
    moved = stages["b", 1]
    assert moved.stage is SeedStage.TRAINING, "grafting came later than the boundary"
    assert (moved.since_step, moved.steps_in_stage, moved.germinated_at_step) == (10, STEP - 10, 0)
    assert (moved.num_germinations, moved.num_given_up) == (1, 0)
    assert (moved.breaker, moved.num_failures) == (BreakerState.HALF_OPEN, 9)
    assert (moved.num_rejections, seen.num_rejections) == (2, 2)
    assert stages["a", 0].stage is SeedStage.DORMANT
    assert [e.epoch for e in seen.epochs] == [0, 1]
    assert [e.gains for e in seen.epochs] == [{"val_accuracy": None}, {"val_accuracy": 0.25}]
    assert seen.layers[0].health["health_score"] == 0.5
    assert seen.layers[0].health_change["health_score"] == -0.25
    assert seen.layers[1].health["health_score"] is None
    assert (seen.progress, seen.planned_epochs, seen.num_telemetry_lost) == (0.5, 4, 7)
    assert [k.blueprint_version for k in seen.kernels] == [2], "one of a blueprint: the newest that was folded"


def test_a_late_signal_counts_in_views_of_boundaries_that_came_after_it() -> None:
    late = window_row(folded([1.0]), last_complete_window(STEP), late_from=30, log_offset=9)
    before = rows([0.5])
    seen = assemble(replace(before, windows=[late, *before.windows]))
    assert (seen.seeds[0].num_signals, seen.seeds[0].health["health_score"]) == (2, 0.75)


def test_a_resumed_run_starts_from_what_its_checkpoint_held() -> None:
    held = [{"layer_id": "b", "seed_id": 1, "stage": "grafting", "stage_since_step": 30, "blueprint_id": "x"}]
    own = {
        "incarnation": 2,
        "sequence": 1,
        "seen_from": 1,
        "layer_id": "a",
        "seed_id": 0,
        "blueprint_id": "x",
        "num_parameters": 5,
    }
    told = rows([0.5]).lifecycle[:2]
    moves = [
        *told,
        {**told[0], "layer_id": "a", "step": 15, "sequence": 11},
        {**own, "step": 35, "to_stage": "germinated"},
    ]
    fields = {"incarnation": 2, "from_step": 32, "last_sequences": {"control.kasmina.lifecycle": 1}}
    seen = assemble(
        rows(
            [0.5],
            boundary={**rows([0.5]).boundary, **fields},
            line=[{"incarnation": 2, "lifecycle_sequence": 1}, {"incarnation": 1, "lifecycle_sequence": 11}],
            resumed_seeds=held,
            lifecycle=moves,
        )
    )
    seeds = {(s.layer_id, s.seed_id): s for s in seen.seeds}
    kept, again, gone = seeds["b", 1], seeds["a", 0], seeds["a", 1]
    assert (kept.stage, kept.since_step, kept.blueprint_id) == (SeedStage.GRAFTING, 30, "x")
    assert (kept.germinated_at_step, kept.num_parameters) == (0, 5), (
        "older incarnations know what a checkpoint does not"
    )
    assert (again.stage, again.num_germinations, again.germinated_at_step) == (SeedStage.GERMINATED, 1, 35)
    assert (gone.stage, gone.since_step, gone.num_germinations, gone.num_parameters) == (SeedStage.DORMANT, 32, 1, 0)
    assert seen.steps_since_start == STEP - 32


@given(scores=SCORES, cut=st.integers(0, 30))
def test_a_window_folded_in_two_batches_has_the_bits_of_one(scores: list[float], cut: int) -> None:
    first = folded(scores[:cut])
    assert added([signal(health_score=score) for score in scores[cut:]], first) == folded(scores)


NUMBERS = st.none() | st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False)
SIGNALS = st.lists(st.builds(signal, health_score=st.floats(0, 1), activation_mean=NUMBERS), max_size=4)


@given(
    told=st.lists(st.tuples(SIGNALS, st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 2)), max_size=14),
    num_seeds=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_health_is_what_windows_added_one_after_the_other_give(
    told: list[tuple[list[HealthSignal], str, int, int]], num_seeds: tuple[int, int]
) -> None:
    newest, windows = last_complete_window(STEP), [(added(signals), *place) for signals, *place in told]
    stored = [window_row(w, newest - back * WINDOW_STEPS, layer_id=a, seed_id=n) for w, a, n, back in windows]
    layers = [{**r, "num_seeds": n} for r, n in zip(rows([1.0]).layers, num_seeds, strict=True)]
    seen = assemble(rows([1.0], windows=stored, layers=layers))

    def of_seed(layer_id: str, seed_id: int, back: int) -> HealthWindow:
        return total_of(w for w, *place in windows if place == [layer_id, seed_id, back])

    for seed in seen.seeds:
        now, before = (of_seed(seed.layer_id, seed.seed_id, back) for back in (0, 1))
        assert (seed.health, seed.health_change) == (now.means, change_of(now, before))
        assert (seed.num_signals, seed.non_finite_ratio) == (now.num_signals, now.non_finite_ratio)
    for layer in seen.layers:
        now, before = (total_of(of_seed(layer.layer_id, n, b) for n in range(layer.num_seeds)) for b in (0, 1))
        assert (layer.health, layer.health_change) == (now.means, change_of(now, before))
        assert (layer.num_signals, layer.non_finite_ratio) == (now.num_signals, now.non_finite_ratio)


def test_windows_are_complete_only_with_their_last_step() -> None:
    assert last_complete_window(WINDOW_STEPS - 2) < 0
    assert last_complete_window(WINDOW_STEPS - 1) == 0
    assert last_complete_window(2 * WINDOW_STEPS - 2) == 0


@pytest.mark.parametrize("numbers", [(1.7e308, 1.7e308), (1.7e308, 1.7e308, -1.7e308, -1.7e308), (-1.7e308, -1.7e308)])
def test_numbers_beyond_float64_are_null_and_no_view_is_lost(numbers: tuple[float, ...]) -> None:
    window = added([signal(health_score=0.5, activation_mean=number) for number in numbers])
    start = last_complete_window(STEP)
    told = [{**e, "metrics": {"loss": n}} for e, n in zip(rows([1.0]).epochs, (1.7e308, -1.7e308), strict=False)]
    seen = assemble(
        rows([1.0], windows=[window_row(window, start), window_row(folded([0.5]), start - WINDOW_STEPS)], epochs=told)
    )
    assert seen.seeds[0].health["activation_mean"] is None
    assert seen.seeds[0].health["health_score"] == 0.5
    assert seen.epochs[1].gains == {"loss": None}
    assert GraphView.from_bytes(seen.to_bytes()) == seen


def test_a_view_holds_the_newest_epochs_and_says_how_many_there_were() -> None:
    told = [{**rows([1.0]).epochs[0], "epoch": n, "step": n} for n in range(MAX_EPOCHS + 9)]
    seen = assemble(rows([1.0], epochs=told, num_epochs=len(told)))
    assert [e.epoch for e in seen.epochs] == list(range(9, MAX_EPOCHS + 9))
    assert (seen.num_epochs, seen.progress) == (MAX_EPOCHS + 9, 1.0)


# -- bytes ----------------------------------------------------------------------------------------


def test_numbers_keep_their_form_whatever_writes_them() -> None:
    numbers = (0.1, -0.0, 1e-7, 1e16, 5e-324, 1.7976931348623157e308, 100.0, 1 / 3)
    told = [{**rows([1.0]).epochs[0], "metrics": {f"m{n}": number for n, number in enumerate(numbers)}}]
    written = assemble(rows([1.0], epochs=told, num_epochs=2**63 - 1)).to_bytes().decode()
    assert (
        '"metrics":[{"m0":0.1,"m1":-0.0,"m2":1e-7,"m3":1e16,"m4":5e-324,"m5":1.7976931348623157e308,"m6":100.0,'
        '"m7":0.3333333333333333}]'
    ) in written
    assert '"num_epochs":9223372036854775807' in written


def test_counts_beyond_int64_lose_no_view() -> None:
    gap = rows([1.0]).gaps[0]
    seen = assemble(rows([1.0], gaps=[{**gap, "num_lost": 2**63 - 1}] * 4))
    assert seen.num_telemetry_lost == 2**63 - 1
    boundary = {**rows([1.0]).boundary, "hyperparameters": {"epochs": 10**40}}
    assert assemble(rows([1.0], boundary=boundary)).planned_epochs is None
    assert GraphView.from_bytes(seen.to_bytes()) == seen


@given(scores=SCORES)
def test_bytes_come_back_as_the_view_that_they_were(scores: list[float]) -> None:
    seen = assemble(rows(scores))
    back = GraphView.from_bytes(seen.to_bytes())
    assert back == seen
    assert back.to_bytes() == seen.to_bytes()
    assert back.digest == digest_of(seen.to_bytes())


def test_the_bytes_hold_the_declared_features_and_nothing_else() -> None:
    form = json.loads(assemble(rows([0.5])).to_bytes())
    tables = {
        "layers": Level.LAYER,
        "edges": Level.EDGE,
        "seeds": Level.SEED,
        "epochs": Level.EPOCH,
        "kernels": Level.KERNEL,
    }
    assert form.keys() == {*(f.name for f in FEATURES[Level.RUN]), *tables, "view_version"}
    for table, level in tables.items():
        assert form[table].keys() == {f.name for f in FEATURES[level]}
    for level, features in FEATURES.items():
        assert len({f.name for f in features}) == len(features), level
        assert all(1 <= f.since <= VIEW_VERSION and f.formula and f.source for f in features)


def test_the_page_of_views_says_what_is_declared() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == replace_feature_tables(page), "run: python -m esper.graph.feature_docs docs/reference/view-features.md"


def test_null_is_only_where_a_feature_says_so() -> None:
    empty = ViewRows(
        boundary=rows([0.5]).boundary, edges=(), line=(), resumed_seeds=(), lifecycle=(), breakers=(), rejections=(),
        epochs=rows([0.5]).epochs, num_epochs=0, gaps=(), windows=(), kernels=[kernel_row()], layers=rows([0.5]).layers,
        blueprint_offsets=(9,) * 6,
    )  # fmt: skip
    for seen in (assemble(empty), assemble(rows([0.5])), GraphView.from_bytes(VERSION_1.read_bytes())):
        things = {
            Level.RUN: [seen],
            Level.LAYER: seen.layers,
            Level.SEED: seen.seeds,
            Level.EPOCH: seen.epochs,
            Level.KERNEL: seen.kernels,
        }
        for level, found in things.items():
            for feature in FEATURES[level]:
                values = [value_of(thing, feature) for thing in found]
                assert values, "each level has something in it"
                assert feature.is_nullable or None not in values, feature


def test_views_of_version_1_are_read_for_ever() -> None:
    data = VERSION_1.read_bytes()
    assert digest_of(data) == "3ddc01285148780d322761b922d3f45112ad8d2f1714ca3ec264659b5c6d92ad"
    seen = GraphView.from_bytes(data)
    assert (seen.run_id, seen.boundary, seen.step, seen.num_epochs, seen.edges) == ("r", 2, 48, 2, (("a", "b"),))
    assert seen.layers[0].health == {**dict.fromkeys(FIELDS), "health_score": 0.375, "gradient_norm": 0.1}
    assert (seen.layers[0].non_finite_ratio, seen.layers[0].num_signals) == (0.0, None)
    (moved,) = [s for s in seen.seeds if s.stage is SeedStage.GERMINATED]
    assert (moved.layer_id, moved.seed_id, moved.since_step, moved.blueprint_id, moved.breaker) == (
        "b",
        1,
        10,
        "x",
        None,
    )
    assert seen.epochs[1].metrics == {"val_accuracy": 0.3, "loss": None}
    assert seen.kernels[0].num_parameters == 5
    assert (seen.blueprint_offsets, seen.progress) == ((), None), "what version 1 did not have is not known"
    assert GraphView.from_bytes(seen.to_bytes()) == seen


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[]", b"{}", b'{"view_version":true}', b'{"view_version":1}', b'{"view_version":2,"layers":[]}']
)  # fmt: skip
def test_what_is_no_view_is_refused(data: bytes) -> None:
    with pytest.raises(ContractError, match="no view"):
        GraphView.from_bytes(data)


def test_columns_of_different_length_are_refused() -> None:
    form = json.loads(assemble(rows([0.5])).to_bytes())
    form["seeds"]["stage"].pop()
    with pytest.raises(ContractError, match="differ in length"):
        GraphView.from_bytes(json.dumps(form).encode())


@pytest.mark.parametrize("word", ["asleep", 7, ["dormant"], {}, None])
def test_a_stage_that_there_is_not_is_refused_when_the_view_is_read(word: Any) -> None:
    form = json.loads(assemble(rows([0.5])).to_bytes())
    form["seeds"]["stage"][1] = word
    with pytest.raises(ContractError, match="no view"):
        GraphView.from_bytes(json.dumps(form).encode())


@pytest.mark.parametrize(("level", "column"), [("seeds", "layer_id"), ("edges", "source"), ("edges", "target")])
def test_a_seed_or_an_edge_of_a_layer_that_there_is_not_is_refused(level: str, column: str) -> None:
    form = json.loads(assemble(rows([0.5])).to_bytes())
    form[level][column][0] = "elsewhere"
    with pytest.raises(ContractError, match="no view: there is no layer 'elsewhere'"):
        GraphView.from_bytes(json.dumps(form).encode())


def test_seeds_that_are_made_as_they_are_looked_at_are_those_of_the_whole() -> None:
    data = assemble(rows([0.5])).to_bytes()
    seeds, whole = GraphView.from_bytes(data).seeds, tuple(GraphView.from_bytes(data).seeds)
    assert [seeds[n] for n in range(-4, 4)] == [*whole, *whole]
    assert seeds[1:3] == whole[1:3]
    assert seeds == whole
    assert seeds != whole[:3]
    with pytest.raises(IndexError):
        seeds[4]


def test_a_newer_view_is_refused_and_says_what_to_do() -> None:
    form = {**json.loads(VERSION_1.read_bytes()), "view_version": VIEW_VERSION + 1}
    with pytest.raises(NewerVersionError, match="upgrade"):
        GraphView.from_bytes(json.dumps(form).encode())
