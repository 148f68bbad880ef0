"""Health signals: the numbers are right, bounded, never lost; and watching leaves no trace."""

import copy
import gc
import math
import pickle
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import esper
from esper.kasmina import readings
from esper.kasmina.health import SPREAD, Measured
from esper.kasmina.hosts import CHANNEL_DIM
from esper.kasmina.model import MorphableModel
from esper.kasmina.samples import (
    GRADIENT_VALUES,
    OUTPUT_VALUES,
    chunk_lengths,
    sample_gradient,
    sample_output,
)
from esper.schemas.enums import LayerKind
from esper.schemas.operational import HealthSignal

CPU = torch.device("cpu")


def measured(model: MorphableModel, *inputs: Any, backward: bool = True) -> dict[str, tuple[HealthSignal, ...]]:
    """The signals of one training pass."""
    model.zero_grad()
    model.probe.arm()
    out = model(*inputs)
    if backward:
        (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()
    model.probe.collect(step=1, epoch=0)
    found: list[Measured] = model.probe.finished()
    return found[0][2] if found else {}


def wrapped(*layers: nn.Module, seeds: int = 4) -> MorphableModel:
    return esper.wrap(nn.Sequential(*layers), [type(m) for m in layers], seeds)


def participation_ratio(chunk: Tensor) -> float:
    covariance = (chunk - chunk.mean(1, keepdim=True)) @ (chunk - chunk.mean(1, keepdim=True)).T
    return float(covariance.trace() ** 2 / covariance.square().sum())


@st.composite
def small_layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor, int]:
    """A layer, an input and a number of seeds, small enough that all of it is read."""
    kind, width, batch = draw(st.sampled_from(sorted(CHANNEL_DIM))), draw(st.integers(1, 20)), draw(st.integers(1, 6))
    side = draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    if kind is LayerKind.LINEAR:
        shape = draw(st.sampled_from([(3,), (batch, 3), (batch, side, 3)]))
        return nn.Linear(3, width), torch.randn(shape) * 5, draw(st.integers(1, 24))
    is_1d = kind is LayerKind.CONV1D
    layer: nn.Module = nn.Conv1d(3, width, 1) if is_1d else nn.Conv2d(3, width, 1)
    x = torch.randn(batch, 3, side) if is_1d else torch.randn(batch, 3, side, side)
    if not is_1d and draw(st.booleans()):
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return layer, x * 5, draw(st.integers(1, 24))


@settings(max_examples=80, deadline=None)
@given(small_layers())
def test_signals_equal_a_plain_loop_over_the_chunks(drawn: tuple[nn.Module, Tensor, int]) -> None:
    layer, x, num_seeds = drawn
    model = wrapped(layer, seeds=num_seeds)
    handle = model.layers["0"]
    signals = measured(model, x)["0"]
    assert [s.seed_id for s in signals] == list(range(min(num_seeds, handle.num_features)))
    by_channel = layer(x).detach().double().movedim(CHANNEL_DIM[handle.kind], 0).reshape(handle.num_features, -1)
    rows = torch.cat([p.grad.reshape(handle.num_features, -1) for p in layer.parameters()], 1).double()
    for signal, part in zip(signals, torch.arange(handle.num_features).tensor_split(handle.num_seeds), strict=True):
        chunk = by_channel[part]
        std = float(chunk.std(correction=0))
        dead = float((chunk.amax(1) <= 0).double().mean())
        near = pytest.approx
        assert signal.activation_mean == near(float(chunk.mean()), rel=1e-4, abs=1e-4)
        assert signal.activation_std == near(std, rel=1e-4, abs=1e-4)
        assert signal.dead_ratio == near(dead, abs=1e-6)
        assert signal.gradient_norm == near(float(rows[part].norm()), rel=1e-4, abs=1e-6)
        assert signal.health_score == near((1 - dead) * std / (std + SPREAD), abs=1e-2 if std < 1e-3 else 1e-3)
        if signal.effective_rank is None:
            assert chunk.shape[1] == 1 or handle.num_features // handle.num_seeds == 1
        elif handle.num_features % handle.num_seeds == 0 and len(chunk) <= readings.RANK_CHANNELS:
            assert signal.effective_rank == near(participation_ratio(chunk), rel=1e-2)


shapes = st.one_of(
    st.tuples(st.integers(1, 4096), st.integers(1, 200_000)),
    st.tuples(st.integers(1, 600), st.integers(1, 600), st.integers(1, 4096)),
    st.tuples(st.integers(1, 256), st.integers(1, 2048), st.integers(1, 300), st.integers(1, 300)),
)


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(1, 1024))
def test_what_is_read_of_an_output_is_bounded_and_every_seed_has_its_part(shape: tuple[int, ...], seeds: int) -> None:
    h = torch.zeros(()).expand(shape)  # as large as it likes, and takes no memory
    dim = {2: -1, 3: -2, 4: -3}[len(shape)]
    num_features = shape[dim]
    seeds = min(seeds, num_features)
    sample = sample_output(h, dim, seeds)
    whole = h.numel() <= OUTPUT_VALUES // 2
    assert sample.values.numel() <= OUTPUT_VALUES
    assert not whole or sample.values.numel() == h.numel()
    lengths = chunk_lengths(num_features, seeds, sample.channel_step, CPU)
    assert int(lengths.min()) >= 1
    assert int(lengths.sum()) == sample.values.shape[1 - sample.positions_dim]


def test_a_sample_is_spread_over_batch_and_places() -> None:
    n, f, side = 32, 16, 32
    rows = torch.arange(n * side * side, dtype=torch.float32).reshape(n, 1, side, side).expand(n, f, side, side)
    read = sample_output(rows, -3, 4).values[0].sort().values
    assert len(read) == OUTPUT_VALUES // f
    assert set((read // (side * side)).tolist()) == set(range(n))  # every image
    assert len(set((read % side).tolist())) > 1  # more than one column, more than one row
    assert len(set((read // side % side).tolist())) > 1
    assert torch.equal(read, sample_output(rows, -3, 4).values[0].sort().values)


@settings(max_examples=25, deadline=None)
@given(st.integers(64, 1500), st.integers(300, 1500), st.integers(1, 16), st.booleans())
def test_a_large_gradient_is_sampled_close_to_its_norm(rows: int, columns: int, seeds: int, is_turned: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    gradient = torch.randn(rows, columns, generator=generator)
    gradient *= torch.linspace(0.1, 3.0, rows)[:, None] * torch.linspace(2.0, 0.0, columns)  # no two parts alike
    sample = sample_gradient(gradient.T.contiguous() if is_turned else gradient, seeds, channels_last=is_turned)
    assert len(sample.norms) <= max(rows, GRADIENT_VALUES // 64 + 4 * seeds)
    parts = sample.norms.split(sample.lengths.tolist())
    for part, scale, exact in zip(parts, sample.scales, gradient.tensor_split(seeds), strict=True):
        assert math.sqrt(scale * float(part.square().sum())) == pytest.approx(float(exact.norm()), rel=0.4)


def test_gradients_are_found_wherever_a_layer_keeps_its_weights() -> None:
    class Conv1D(nn.Module):  # as transformers has it: the weight is (in, out)
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight, self.bias = 6, nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    turned, normed = Conv1D(), parametrizations.weight_norm(nn.Linear(6, 6))
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    x = torch.randn(3, 5, 6)

    signals = measured(wrapped(turned, seeds=2), x)["0"]
    kept = torch.cat([turned.weight.grad.T, turned.bias.grad[:, None]], 1)
    assert signals[1].gradient_norm == pytest.approx(float(kept[3:].norm()), rel=1e-4)

    signals = measured(wrapped(normed, seeds=2), x)["0"]
    kept = torch.cat([p.grad.reshape(6, -1) for p in normed.parameters()], 1)
    assert kept.shape == (6, 8)  # the weight itself is computed, and has no gradient: its two parts have
    assert signals[1].gradient_norm == pytest.approx(float(kept[3:].norm()), rel=1e-4)

    signals = measured(esper.wrap(Attending(attention), [nn.MultiheadAttention], 2), x)["attention"]
    kept = torch.cat([attention.out_proj.weight.grad, attention.out_proj.bias.grad[:, None]], 1)
    assert signals[1].gradient_norm == pytest.approx(float(kept[3:].norm()), rel=1e-4)


class Attending(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_a_frozen_layer_has_no_gradient_and_a_live_one_keeps_its_other_statistics() -> None:
    model = wrapped(nn.Linear(4, 8), nn.Linear(8, 4))
    model.host[0].requires_grad_(False)
    signals = measured(model, torch.randn(5, 4))
    assert all(s.gradient_norm is None and s.activation_std and not s.non_finite for s in signals["0"])
    assert all(s.gradient_norm is not None for s in signals["1"])
    dead = measured(model, torch.full((5, 4), math.nan))["0"]
    assert all(s.non_finite and s.activation_mean is None and s.health_score == 0.0 for s in dead)


def test_one_sick_channel_makes_one_seed_sick() -> None:
    model = wrapped(nn.Linear(4, 8))
    with torch.no_grad():
        model.host[0].bias[5] = math.nan
    assert [s.non_finite for s in measured(model, torch.randn(5, 4), backward=False)["0"]] == [
        False,
        False,
        True,
        False,
    ]


class Outputs(nn.Linear):
    """A layer whose output is whatever the test says."""

    gives: Any = None

    def forward(self, x: Tensor) -> Any:
        super().forward(x)
        return self.gives


@pytest.mark.parametrize(
    ("gives", "mean"),
    [
        (torch.full((3, 4), 2.0, dtype=torch.bfloat16), 2.0),
        (torch.full((3, 4), 60_000.0, dtype=torch.float16), 60_000.0),
        (torch.full((3, 4), 7, dtype=torch.int32), 7.0),
        (torch.full((3, 4), 1.5, dtype=torch.float64), 1.5),
        ((torch.full((3, 4), 2.0), None), 2.0),
        (torch.full((4,), 2.0), 2.0),
        (torch.zeros(0, 4), None),
        (torch.zeros(3, 5), None),
        (torch.zeros(3, 4, dtype=torch.complex64), None),
        (torch.zeros(3, 4, device="meta"), None),
        ("text", None),
    ],
    ids=lambda v: str(getattr(v, "dtype", type(v).__name__)),
)
def test_any_output_is_measured_or_its_layer_is_silent(gives: Any, mean: float | None) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), Outputs(4, 4)), [nn.Linear])
    model.host[1].gives = gives
    model.probe.arm()
    model.host(torch.randn(3, 4))
    model.probe.collect(1, 0)
    ((_step, _epoch, signals),) = model.probe.finished()
    assert model.probe.silent_layers == (("1",) if mean is None else ())
    assert [s.activation_mean for s in signals.get("1", ())] == ([mean] * 4 if mean is not None else [])
    assert "0" in signals


def test_under_autocast_the_numbers_are_those_of_the_output() -> None:
    model, x = wrapped(nn.Linear(32, 64)), torch.randn(16, 32)
    plain = measured(model, x)["0"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = measured(model, x)["0"]
    for a, b in zip(plain, mixed, strict=True):
        assert b.activation_std == pytest.approx(a.activation_std, rel=0.02)
        assert b.effective_rank == pytest.approx(a.effective_rank, rel=0.02)


def test_watching_leaves_no_trace_and_others_hooks_alone() -> None:
    model, calls = wrapped(nn.Linear(4, 4)), []
    theirs = model.host[0].register_forward_hook(lambda *_args: calls.append(1))
    x = torch.randn(2, 4)
    expected = model(x)
    model.probe.arm()
    assert torch.equal(model(x), expected)
    model.probe.collect(1, 0)
    assert list(model.host[0]._forward_hooks) == [theirs.id]
    assert len(calls) == 2
    model.probe.arm()
    host = model.host
    del model
    gc.collect()
    assert list(host[0]._forward_hooks) == [theirs.id]  # a probe that is dropped while armed stops watching


def test_copies_of_an_armed_model_do_not_watch() -> None:
    model, x = wrapped(nn.Linear(4, 4)), torch.randn(2, 4)
    model.probe.arm()
    average = torch.optim.swa_utils.AveragedModel(model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (average, average.module, twin, thawed, copy.deepcopy(model.host)):
        assert torch.equal(other(x), model.host[0](x))
        assert not any(m._forward_hooks for m in other.modules())
    model(x + 1)
    for other in (average.module, twin, thawed):
        other(x)
        assert not other.probe.is_armed
    model.probe.collect(1, 0)
    ((_step, _epoch, signals),) = model.probe.finished()
    assert signals["0"] == tuple(s for s in measured(twin, x + 1, backward=False)["0"])


def test_the_last_call_counts_evaluations_do_not_and_silent_layers_are_named() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            read = dict(self.named_children())["read"]  # in a way that wrap() does not see through
            return nn.functional.linear(self.used(self.used(x)), read.weight)

    model = esper.wrap(Shared(), seeds_per_layer=1)
    probe, x = model.probe, torch.randn(8, 4)
    assert probe.silent_layers == ()
    probe.arm()
    model(x)
    last = model.used(model.used(x)).detach().mean()
    model.eval()
    with torch.no_grad():
        model(x * 100)
    probe.collect(1, 0)
    ((_step, _epoch, signals),) = probe.finished()
    assert set(signals) == {"used"}
    assert probe.silent_layers == ("read",)
    assert signals["used"][0].activation_mean == pytest.approx(float(last), rel=1e-4)
    probe.arm()
    probe.collect(2, 0)
    assert probe.finished() == []  # nothing ran: nothing is said


def test_signals_come_when_the_copy_is_done_with_the_step_they_were_measured_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = wrapped(nn.Linear(4, 4)), torch.randn(2, 4)
    is_done = False
    monkeypatch.setattr(readings.Reading, "is_done", property(lambda _self: is_done))
    for step in (10, 20, 30):
        model.probe.arm()
        model(x)
        model.probe.collect(step, epoch=step // 20)
        assert model.probe.finished() == []
    assert [(step, epoch) for step, epoch, _signals in model.probe.drain(up_to_step=15)] == [(10, 0)]
    is_done = True
    assert [(step, epoch) for step, epoch, _signals in model.probe.finished()] == [(20, 1), (30, 1)]
    assert model.probe.drain() == []


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_compiled_model_gives_the_same_signals_and_is_not_compiled_again() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        compiled.append(1)
        return graph.forward

    torch.manual_seed(0)
    plain = esper.wrap(TwoLayers())
    model = esper.wrap(copy.deepcopy(plain.host))
    x = torch.randn(4, 8)
    run = torch.compile(model, backend=backend, fullgraph=True)
    run(x).sum().backward()
    assert len(compiled) == 1
    for _sampled in range(3):
        model.zero_grad()
        model.probe.arm()
        run(x).float().square().mean().backward()
        model.probe.collect(1, 0)
        ((_step, _epoch, signals),) = model.probe.finished()
        assert signals == measured(plain, x)
        run(x).sum().backward()
    assert len(compiled) == 1
    graphs = torch.compile(TwoLayers(), backend=backend)
    graphs(x)
    assert len(compiled) == 2  # what was not compiled yet still is: the stance is what it was


def test_the_stance_is_held_by_all_armed_probes_and_let_go_by_the_last() -> None:
    import torch._dynamo.eval_frame as eval_frame

    def stance() -> str:
        return str(eval_frame._stance.stance)

    first, second = wrapped(nn.Linear(4, 4)), wrapped(nn.Linear(4, 4))
    with torch.compiler.set_stance("eager_on_recompile"):
        first.probe.arm()
        second.probe.arm()
        assert stance() == "force_eager"
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            first(torch.randn(2, 5))
        first.probe.disarm()
        assert stance() == "force_eager"
        second.probe.collect(1, 0)
        assert stance() == "eager_on_recompile"
        first.probe.arm()
        del first
        gc.collect()
        assert stance() == "eager_on_recompile"


def test_where_nothing_is_compiled_the_compiler_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch._dynamo")]:
        monkeypatch.delitem(sys.modules, name)
    model = wrapped(nn.Linear(4, 4))
    assert measured(model, torch.randn(2, 4))
    assert "torch._dynamo" not in sys.modules


def test_tracing_and_transforms_pass_an_armed_layer_by() -> None:
    model, x = wrapped(nn.Linear(4, 4)), torch.randn(3, 4)
    model.probe.arm()
    torch.func.vmap(model.host)(x)
    torch.func.grad(lambda v: model.host(v).sum())(x)
    torch.export.export(model.host, (x,))
    model.probe.collect(1, 0)
    assert model.probe.finished() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits_and_the_numbers_are_the_same() -> None:
    model = wrapped(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1))
    x = torch.randn(4, 3, 16, 16)
    expected = measured(model, x)
    model.to("cuda").zero_grad()
    x = x.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.probe.arm()
        model(x).square().mean().backward()
        model.probe.collect(1, 0)
        model.probe.finished()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ((_step, _epoch, signals),) = model.probe.drain()
    for layer_id, mine in signals.items():
        for a, b in zip(mine, expected[layer_id], strict=True):
            assert a.activation_std == pytest.approx(b.activation_std, rel=1e-3)
            assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)


def test_chunks_are_those_of_tensor_split() -> None:
    for features, seeds, step in ((10, 3, 1), (11, 4, 2), (4096, 7, 8)):
        kept = torch.arange(features).tensor_split(seeds)
        assert chunk_lengths(features, seeds, step, CPU).tolist() == [int((part % step == 0).sum()) for part in kept]
        assert all(int(a[-1]) < int(b[0]) for a, b in pairwise(kept))
