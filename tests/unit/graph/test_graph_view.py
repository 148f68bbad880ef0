"""Graph views: their bytes hold the declared features, and every version of the bytes stays readable."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events.view_row_examples import kernel_row, view_rows
from support.paths import DOCS, TESTS

from esper.errors import ContractError, NewerVersionError
from esper.graph.assembly import assemble
from esper.graph.feature_docs import replace_feature_tables
from esper.graph.graph_view import GraphView, digest_of
from esper.graph.health_windows import FIELDS
from esper.graph.view_features import FEATURES, VIEW_VERSION, Level, value_of
from esper.graph.view_rows import ViewRows
from esper.schemas.enums import SeedStage

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)
PAGE = DOCS / "reference" / "view-features.md"
VERSION_1 = TESTS / "contract" / "views" / "view-v1.json"


def test_encoding_of_numbers_is_pinned() -> None:
    """The digest of stored views depends on the form of numbers: another JSON library must write the same."""
    numbers = (0.1, -0.0, 1e-7, 1e16, 5e-324, 1.7976931348623157e308, 100.0, 1 / 3)
    epochs = [{**view_rows([1.0]).epochs[0], "metrics": {f"m{n}": number for n, number in enumerate(numbers)}}]
    written = assemble(view_rows([1.0], epochs=epochs, num_epochs=2**63 - 1)).to_bytes().decode()
    assert (
        '"metrics":[{"m0":0.1,"m1":-0.0,"m2":1e-7,"m3":1e16,"m4":5e-324,"m5":1.7976931348623157e308,"m6":100.0,'
        '"m7":0.3333333333333333}]'
    ) in written
    assert '"num_epochs":9223372036854775807' in written


@given(scores=SCORES)
def test_view_round_trips_through_bytes(scores: list[float]) -> None:
    view = assemble(view_rows(scores))
    back = GraphView.from_bytes(view.to_bytes())
    assert back == view
    assert back.to_bytes() == view.to_bytes()
    assert back.digest == digest_of(view.to_bytes())


def test_bytes_hold_exactly_the_declared_features() -> None:
    document = json.loads(assemble(view_rows([0.5])).to_bytes())
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
        boundary=view_rows([0.5]).boundary, edges=(), lineage=(), resumed_seeds=(), lifecycle=(), breakers=(), rejections=(),
        epochs=view_rows([0.5]).epochs, num_epochs=0, gaps=(), windows=(), kernels=[kernel_row()], layers=view_rows([0.5]).layers,
        blueprint_offsets=(9,) * 6,
    )  # fmt: skip
    for view in (assemble(empty), assemble(view_rows([0.5])), GraphView.from_bytes(VERSION_1.read_bytes())):
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
    document = json.loads(assemble(view_rows([0.5])).to_bytes())
    document["seeds"]["stage"].pop()
    with pytest.raises(ContractError, match="differ in length"):
        GraphView.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize("word", ["asleep", 7, ["dormant"], {}, None])
def test_from_bytes_refuses_an_unknown_stage(word: Any) -> None:
    document = json.loads(assemble(view_rows([0.5])).to_bytes())
    document["seeds"]["stage"][1] = word
    with pytest.raises(ContractError, match="not a graph view"):
        GraphView.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(("level", "column"), [("seeds", "layer_id"), ("edges", "source"), ("edges", "target")])
def test_from_bytes_refuses_an_unknown_layer(level: str, column: str) -> None:
    document = json.loads(assemble(view_rows([0.5])).to_bytes())
    document[level][column][0] = "elsewhere"
    with pytest.raises(ContractError, match="not a graph view: a seed or edge names an unknown layer, 'elsewhere'"):
        GraphView.from_bytes(json.dumps(document).encode())


def test_columnar_sequence_equals_its_tuple() -> None:
    data = assemble(view_rows([0.5])).to_bytes()
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
