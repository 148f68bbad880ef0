"""The graph that Tamiyo sees: how data flows between layers, traced or seen in a run on example inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.errors import ContractError
from esper.kasmina.model import MorphableModel

X = torch.linspace(-1.0, 1.0, 6).view(3, 2).requires_grad_()


def edges_of(model: MorphableModel) -> set[tuple[str, str]]:
    return {(e.source, e.target) for e in model.graph()[1]}


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.chosen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("num_calls", torch.zeros(()))
        self.chosen.forward = self.looks_at_values
        self.block = nn.Sequential(self.a, nn.Sequential(self.chosen))
        self.last = None

    def looks_at_values(self, x: Tensor) -> Tensor:
        return self.chosen[0](x) if bool(x.isfinite().all()) else self.chosen[1](x)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.num_calls.add_(1)
        self.last = x + torch.rand(()) * torch.ones(4)
        return self.c(self.norm(self.block[1](self.block[0](self.last) + self.b(x) * scale)))


@pytest.mark.parametrize("example", [None, torch.randn(5, 4), (torch.randn(5, 4), 2.0), {"x": torch.randn(5, 4)}])
def test_the_graph_follows_branches_and_leaves_no_trace_on_the_model(example: Any) -> None:
    """Traced, the part that looks at values is guessed; recorded, it is the branch taken."""
    net = Branching()
    attributes, random = {n: id(v) for n, v in vars(net).items()}, torch.random.get_rng_state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = esper.wrap(net, example_inputs=example)
    edges, topology = edges_of(model), model.topology
    guessed = {("chosen.0", "chosen.1"), ("chosen.1", "c")}
    assert edges == {("a", "chosen.0"), ("b", "chosen.0")} | (guessed if example is None else {("chosen.0", "c")})
    assert topology is not None
    assert topology.chained == (("chosen",) if example is None else ())
    assert topology.unreached == (() if example is None else ("chosen.1",))
    assert {n: id(v) for n, v in vars(net).items()} == attributes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 0.5)


def into_rows(values: list[Tensor]) -> Tensor:
    rows = torch.zeros(len(values), *values[0].shape)
    for n, value in enumerate(values):
        rows[n] = value
    return rows.sum(0)


def into_a_view(values: list[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    for value in values:
        total.view(-1)[:].add_(value.reshape(-1))
    return total


def in_place(values: list[Tensor]) -> Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return torch.relu_(total)


def by_out(values: list[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    with torch.no_grad():
        for value in values:
            torch.add(total, value.detach(), out=total)
    return total


JOINS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": lambda values: sum(values[1:], start=values[0]),
    "stack": lambda values: torch.stack(values).mean(0),
    "einsum": lambda values: torch.einsum("nij,n->ij", torch.stack(values), torch.ones(len(values))),
    "rows": into_rows,
    "view": into_a_view,
    "in place": in_place,
    "out": by_out,
    "function": lambda values: Doubled.apply(sum(values[1:], start=values[0])),
    "index": lambda values: torch.cat(values)[torch.arange(3)] + sum(values) * 0,
    "checkpoint": lambda values: checkpoint(lambda *v: sum(v), *values, use_reentrant=False),
    "reentrant": lambda values: checkpoint(lambda *v: sum(v), *values, use_reentrant=True),
}


class Flow(nn.Module):
    """Modules fed by what came before: ``feeds[n]`` says from where, ``joins[n]`` how it is joined.

    Linear ones hold seeds. ``looks``: forward looks at values, and cannot be traced.
    """

    def __init__(self, feeds: list[set[int]], steps: list[nn.Module], joins: list[str], *, looks: bool) -> None:
        super().__init__()
        self.feeds, self.joins, self.looks = feeds, joins, looks
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and not bool(x.isfinite().all()):
            raise ValueError("x is not finite")
        values: list[Tensor] = []
        for step, feeds, join in zip(self.steps, self.feeds, self.joins, strict=True):
            values.append(step(JOINS[join]([x, *(values[n] for n in sorted(feeds))])))
        return torch.stack(values).sum(0)

    def edges(self) -> set[tuple[str, str]]:
        """The same, worked out by hand: a layer is reached by those that nothing but other modules lie between."""
        reaching: list[set[int]] = []
        found = set()
        for n, (step, feeds) in enumerate(zip(self.steps, self.feeds, strict=True)):
            sources = set().union(*(reaching[f] for f in feeds))
            is_layer = isinstance(step, nn.Linear)
            found |= {(f"steps.{s}", f"steps.{n}") for s in sources if is_layer}
            reaching.append({n} if is_layer else sources)
        return found


@given(st.data(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_graph_is_that_of_the_data_whatever_the_wiring(data: st.DataObject, looks: bool) -> None:
    """Traced where forward does not look at values, recorded where it does: the same edges."""
    kinds = [nn.Linear, nn.Tanh, *([ThroughNumpy] if looks else [])]
    drawn = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=7))
    steps = [linear(), *(linear() if kind is nn.Linear else kind() for kind in drawn)]
    feeds = [data.draw(st.sets(st.integers(0, n - 1))) if n else set() for n in range(len(steps))]
    joins = [data.draw(st.sampled_from([*JOINS] if looks else ["sum", "stack", "einsum"])) for _step in steps]
    flow = Flow(feeds, steps, joins, looks=looks)
    assert edges_of(esper.wrap(flow, example_inputs=X if looks else None)) == flow.edges()


class Shaped(nn.Module):
    """The second layer reads the size of what the first one gave, and none of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.b(x.view(h.shape).view(h.size(0), -1)) + h)


@pytest.mark.parametrize("looks", [False, True])
def test_a_shape_is_no_flow(looks: bool) -> None:
    net = Shaped()
    if looks:
        net.forward = lambda x, forward=net.forward: forward(x) if bool(x.isfinite().all()) else x
    edges = edges_of(esper.wrap(net, example_inputs=X))
    assert edges == {("a", "c"), ("b", "c")}


class Attending(nn.Module):
    """A layer whose output is a view of what it computed within: its inputs do not flow past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        attended, _weights = self.attention(h, h, h) if bool(x.isfinite().all()) else (h, None)
        return self.last(attended)


def test_what_a_layer_gives_comes_from_that_layer_alone() -> None:
    model = esper.wrap(Attending(), [nn.Linear, nn.MultiheadAttention], example_inputs=torch.randn(2, 3, 8))
    assert edges_of(model) == {("first", "attention"), ("attention", "last")}


def test_a_compiled_model_is_run_as_it_was_written() -> None:
    flow = Flow([set(), {0}, {0, 1}], [linear(), linear(), linear()], ["sum"] * 3, looks=True)
    compiled = torch.compile(flow, backend="eager")
    assert torch.equal(compiled(X), flow(X))
    assert edges_of(esper.wrap(compiled, example_inputs=X)) == flow.edges()


@pytest.mark.parametrize(
    ("example", "problem"),
    [(torch.ones(3, 5), "mat1 and mat2"), ({"y": X}, "unexpected keyword"), (3, "is int")],
)
def test_inputs_that_the_model_does_not_take_are_refused_and_leave_no_trace(example: Any, problem: str) -> None:
    flow = Flow([set(), {0}], [linear(), linear()], ["sum"] * 2, looks=True)
    with pytest.raises(ContractError, match=f"{problem}(?s:.*)give a tensor, a tuple of arguments or a mapping"):
        esper.wrap(flow, example_inputs=example)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in flow.modules())
    assert edges_of(esper.wrap(flow, example_inputs=X)) == flow.edges()
