"""The graph network: legal choices only, any size, any order of rows, single views and batches."""

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data.random_views import drawn_view, permuted

from esper.errors import ConfigError, ContractError
from esper.graph.graph_view import GraphView
from esper.graph.view_features import Level
from esper.schemas.enums import Action, SeedStage
from esper.schemas.lifecycle import ACTIVE_STAGES
from esper.services.tamiyo.control.legal_choices import WAIT, Choice, SingleChoice, legal_choices
from esper.services.tamiyo.gnn.gnn_policy import BlueprintVocabulary, GnnPolicy
from esper.services.tamiyo.gnn.graph_batch import GraphBatch
from esper.services.tamiyo.gnn.network import LEVELS, NetworkShape, PolicyNetwork
from esper.services.tamiyo.gnn.policy_file import load_policy, make_card, pack_policy, read_card
from esper.services.tamiyo.gnn.pooling import find_scatter, has_torch_scatter
from esper.services.tamiyo.gnn.settings import NetworkSettings
from esper.services.tamiyo.gnn.view_arrays import input_names, read_view
from esper.services.tamiyo.policies import EpsilonSoft

HAS_BOTH = has_torch_scatter() and sys.modules.get("torch_geometric", "there") is not None
BLUEPRINTS = BlueprintVocabulary(("blueprint-0", "blueprint-1"))
VIEWS = st.builds(
    lambda seed, layers, seeds: drawn_view(random.Random(seed), layers, seeds_per_layer=seeds),
    st.integers(0, 10**6),
    st.integers(0, 7),
    st.integers(1, 4),
)


def network(dtype: torch.dtype = torch.float64) -> PolicyNetwork:
    """A network whose outputs depend on every input; a new one has heads near zero."""
    torch.manual_seed(3)
    made = PolicyNetwork(NetworkShape(width=16, rounds=2, num_blueprints=2)).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


class InDouble(GnnPolicy):
    """Computes in float64, so that the order of sums does not matter."""

    def _batch(self, *of: Any) -> GraphBatch:
        return super()._batch(*of).map(lambda t: t.double() if t.is_floating_point() else t)


@pytest.fixture(scope="module")
def policy() -> GnnPolicy:
    return InDouble(network(), BLUEPRINTS, temperature=0.01, options=NetworkSettings(device="cpu"))


def expected_choices(view: GraphView) -> Iterator[Choice]:
    """The legal choices, enumerated in the simplest way."""
    yield WAIT
    layers = {layer.layer_id: layer for layer in view.layers}
    for seed in view.seeds:
        layer = layers[seed.layer_id]
        if seed.stage is SeedStage.DORMANT:
            fitting = [k for k in view.kernels if (k.target, k.num_features) == (layer.kind, layer.num_features)]
            yield from (Choice(Action.GERMINATE, seed, kernel) for kernel in fitting)
        if seed.stage in ACTIVE_STAGES:
            yield Choice(Action.CULL, seed)
        if seed.stage is SeedStage.EVALUATING:
            yield Choice(Action.FOSSILIZE, seed)


@given(VIEWS)
def test_legal_choices_follow_lifecycle_and_kernels(view: GraphView) -> None:
    choices = legal_choices(view)
    assert list(choices) == list(expected_choices(view))
    assert [choices[n] for n in range(len(choices))] == list(choices)


@given(view=VIEWS)
@settings(max_examples=30)
def test_probabilities_of_legal_choices_sum_to_one(policy: GnnPolicy, view: GraphView) -> None:
    choices = legal_choices(view)
    distribution = policy.distribution(view, choices)
    probabilities = EpsilonSoft(policy, 0.05, 1).soften(distribution, len(choices))
    assert list(choices) == list(expected_choices(view))
    assert len(probabilities) == len(choices)
    assert sum(probabilities) == pytest.approx(1.0)
    assert min(probabilities) > 0.0
    assert "val_accuracy" in distribution.reason


@given(view=VIEWS, chance=st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_gains_are_equivariant_to_the_order_of_rows(policy: GnnPolicy, view: GraphView, chance: random.Random) -> None:
    other = permuted(view, chance)
    (gains, value), (moved, same) = policy.gains([view])[0], policy.gains([other])[0]
    by_choice = {_named(c): g for c, g in zip(legal_choices(view), gains, strict=True)}
    for choice, gain in zip(legal_choices(other), moved, strict=True):
        assert gain == pytest.approx(by_choice[_named(choice)], abs=1e-9)
    assert same == pytest.approx(value, abs=1e-9)


@given(views=st.lists(VIEWS, min_size=1, max_size=5))
@settings(max_examples=30)
def test_batch_equals_single_views(policy: GnnPolicy, views: list[GraphView]) -> None:
    for (gains, value), view in zip(policy.gains(views), views, strict=True):
        alone, its_value = policy.gains([view])[0]
        assert gains == pytest.approx(alone, abs=1e-9)
        assert value == pytest.approx(its_value, abs=1e-9)


def test_gains_depend_on_every_input() -> None:
    """The gradient of the gains is nonzero in every row of the inputs."""
    view = drawn_view(random.Random(1), 4)
    net, arrays = network(torch.float32), read_view(view, "val_accuracy")
    batch = GraphBatch.of([arrays], BLUEPRINTS.codes)
    for level in (Level.RUN, Level.LAYER, Level.SEED, Level.KERNEL):
        values = getattr(batch, {"run": "run", "layer": "layers", "seed": "seeds", "kernel": "kernels"}[level])
        values.requires_grad_()
    net(batch).gain.sum().backward()
    for values in (batch.run, batch.layers, batch.seeds):
        assert (values.grad != 0).any(dim=1).all()
    assert (batch.kernels.grad != 0).any()


@given(view=VIEWS, other=st.sampled_from(["a" * 7, "zeta"]))
@settings(max_examples=15)
def test_gains_ignore_names_and_time(policy: GnnPolicy, view: GraphView, other: str) -> None:
    elsewhere = replace(view, run_id=other, incarnation=9, boundary=77, step=view.step + 10**6)
    assert (policy.gains([elsewhere])[0][0] == policy.gains([view])[0][0]).all()


@pytest.mark.skipif(not HAS_BOTH, reason="needs torch-geometric and torch-scatter: make test-scatter")
@given(views=st.lists(VIEWS, min_size=1, max_size=3))
@settings(max_examples=30)
def test_torch_scatter_and_torch_geometric_agree(views: list[GraphView]) -> None:
    fast = GnnPolicy(
        network(torch.float32),
        BLUEPRINTS,
        temperature=0.01,
        options=NetworkSettings(scatter="torch-scatter", device="cpu"),
    )
    plain = GnnPolicy(
        network(torch.float32),
        BLUEPRINTS,
        temperature=0.01,
        options=NetworkSettings(scatter="torch-geometric", device="cpu"),
    )
    for (gains, value), (same, its_value) in zip(fast.gains(views), plain.gains(views), strict=True):
        assert gains == pytest.approx(same, abs=1e-6)
        assert value == pytest.approx(its_value, abs=1e-6)


def test_status_names_the_scatter_library() -> None:
    found = GnnPolicy(network(), BLUEPRINTS, temperature=0.01, options=NetworkSettings(device="cpu"))
    expected = "torch-scatter" if has_torch_scatter() else "torch-geometric"
    assert found.acceleration_status["scatter"] == expected
    if not has_torch_scatter():
        with pytest.raises(ConfigError, match=r"pip install 'esper\[scatter\]'"):
            find_scatter("torch-scatter")


def test_inputs_are_standardized_and_constant_ones_are_zero() -> None:
    views = [drawn_view(random.Random(n), 5) for n in range(9)]
    batch = GraphBatch.of([read_view(v, "val_accuracy") for v in views], {})
    net = network(torch.float32)
    rows = {Level.RUN: batch.run, Level.LAYER: batch.layers, Level.SEED: batch.seeds, Level.KERNEL: batch.kernels}
    net.fit_scales(rows)
    for level in LEVELS:
        scaled = net.scales[level](rows[level])
        constant = rows[level].std(dim=0, correction=0) < 1e-6
        assert not scaled[:, constant].any()
        assert scaled.mean(dim=0).abs().max() < 0.5
        assert len(input_names(level)) == scaled.shape[1]


def test_scale_without_rows_stays_finite() -> None:
    net = network(torch.float32)
    net.fit_scales({level: torch.zeros(0 if level is Level.KERNEL else 3, len(input_names(level))) for level in LEVELS})
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())


@pytest.mark.parametrize("device", ["cud", "meta", "cuda:99"])
def test_unavailable_device_is_named_with_its_setting(device: str) -> None:
    with pytest.raises(ConfigError, match=f"tamiyo.network.device is '{device}'"):
        GnnPolicy(network(), BLUEPRINTS, temperature=0.01, options=NetworkSettings(device=device))


# the file


def packed(**changed: object) -> bytes:
    net = network(torch.float32)
    card = make_card(net.shape, BLUEPRINTS, "val_accuracy", 0.02)
    return pack_policy(net, card.model_copy(update=changed))


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_policy_file_round_trips_to_the_bit() -> None:
    view = drawn_view(random.Random(2), 6)
    data = packed()
    assert data == packed()
    read = load_policy(data, hashlib.sha256(data).hexdigest(), NetworkSettings(device="cpu"))
    made = GnnPolicy(network(torch.float32), BLUEPRINTS, temperature=0.02, options=NetworkSettings(device="cpu"))
    ours, theirs = (policy.distribution(view, legal_choices(view)) for policy in (read, made))
    assert (ours.probabilities == theirs.probabilities).all()
    assert ours.reason == theirs.reason
    assert read_card(data).blueprints == BLUEPRINTS.names


def test_wait_has_probability_half_if_no_gain_is_expected() -> None:
    without_gains = network(torch.float32)
    with torch.no_grad():
        for head in (without_gains.of_seed, without_gains.of_kernel, without_gains.plain):
            for weight in head.parameters():
                weight.zero_()
    policy = GnnPolicy(without_gains, BLUEPRINTS, temperature=0.01, options=NetworkSettings(device="cpu"))
    for num_layers in (1, 4, 12):
        view = drawn_view(random.Random(num_layers), num_layers)
        probabilities = policy.distribution(view, legal_choices(view)).probabilities
        assert probabilities[0] == pytest.approx(0.5)
        assert sum(probabilities[n] for n in range(len(probabilities))) == pytest.approx(1.0)


def other_card(header: dict[str, Any], **changed: object) -> None:
    header["__metadata__"]["esper"] = json.dumps({**json.loads(header["__metadata__"]["esper"]), **changed})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no policy's file"),
        (b"\xff" * 100, "no policy's file"),
        (packed()[:-4], "malformed"),
        (with_header(packed(), lambda h: h.pop("__metadata__")), "no policy's file"),
        (with_header(packed(), lambda h: other_card(h, format="esper-policy-9")), "no policy's file"),
        (with_header(packed(), lambda h: other_card(h, width=17)), "do not fit its card"),
        (with_header(packed(), lambda h: other_card(h, inputs={"run": ["mood"]})), "trained on other inputs"),
        (with_header(packed(), lambda h: h["value.bias"].update(dtype="F64")), "type F32, F64, not F32"),
        (packed().replace(packed()[-4:], b"\x00\x00\xc0\x7f"), "not finite"),
    ],
)
def test_invalid_policy_file_is_rejected(data: bytes, problem: str) -> None:
    with pytest.raises(ContractError, match=problem):
        load_policy(data)


def test_policy_file_with_another_hash_is_rejected() -> None:
    with pytest.raises(ContractError, match="not those of policy 000000000000"):
        load_policy(packed(), "0" * 64)


def _named(choice: Choice) -> tuple[object, ...]:
    seed, kernel = choice.seed, choice.kernel
    place = (seed.layer_id, seed.seed_id) if seed else None
    return (choice.action, place, (kernel.blueprint_id, kernel.target, kernel.num_features) if kernel else None)


@given(view=VIEWS, pick=st.integers(0, 10**6))
@settings(max_examples=30)
def test_single_choice_has_the_gain_it_has_among_all(policy: GnnPolicy, view: GraphView, pick: int) -> None:
    """Training and inference compute the same gain."""
    choices = legal_choices(view)
    index = pick % len(choices)
    batch = GraphBatch.of([read_view(view, "val_accuracy", SingleChoice(choices, index))], BLUEPRINTS.codes)
    with torch.inference_mode():
        scores = policy.network(batch.map(lambda t: t.double() if t.is_floating_point() else t))
    assert scores.gain.tolist() == pytest.approx([policy.gains([view])[0][0][index]], abs=1e-9)
